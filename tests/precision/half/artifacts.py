"""Small artifacts to convert."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.manifest import Stage
from deploy.artifact.writer import ArtifactWriter


def write_graph(path: Path, body: str = "", height: int | str = 8, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A convolution, what `body` does to its result `c`, making `d`, and a linear layer on the mean of that."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((4, 1, 3, 3), dtype=np.float32),
        "v": rng.standard_normal((4, 3), dtype=np.float32),
        "axes": np.array([2, 3]),
    } | (weights or {})
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[batch, 1, {height}, 8] image) => (float[batch, 3] scores) {{
        [conv] c = Conv(image, w) {body or "[relu] d = Relu(c)"} m = ReduceMean<keepdims = 0>(d, axes) [fc] scores = MatMul(m, v) }}"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def make_artifact(out: Path, **changes) -> Artifact:
    """An ONNX artifact in a directory, as an export would leave it."""
    graph = {key: changes.pop(key) for key in ("body", "height", "weights") if key in changes}
    bare = open_artifact(write_graph(out.with_suffix(".onnx"), **graph))
    with ArtifactWriter(out) as writer:
        (writer.path / "model.onnx").write_bytes(bare.payload.read_bytes())
        manifest = msgspec.structs.replace(bare.manifest, files={}, name=out.name, stage=Stage(name="export", request="r"))
        return writer.commit(msgspec.structs.replace(manifest, **changes))

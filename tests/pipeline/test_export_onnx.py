"""An artifact of a bare ONNX file: prepared once, and computing what the file computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import ArtifactError, PrecisionError, UsageError, UserCodeError
from deploy.precision.cpu import CpuGraph


def write(
    path: Path, text: str, *, opset: int = 13, ir_version: int = 8, weights: Mapping[str, tuple[int, ...]] | None = None
) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in (weights or {}).items():
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(onnx.numpy_helper.from_array((rng.normal(size=shape) * scale).astype(np.float32), name))
    onnx.save(model, path)
    return path


def graph(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(artifact.onnx_path).graph


def opset(artifact: Artifact) -> int:
    return int(onnx.load(artifact.onnx_path).opset_import[0].version)


def check_same(artifact: Artifact, path: Path, feed: dict[str, np.ndarray]) -> None:
    expected = CpuGraph.read(path)(feed)
    with deploy.load(artifact, "onnxruntime") as session:
        for name, array in session.run(feed).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


CONV = "g (float[n, 3, h, w] x) => (float[n, 4, a, b] y) { c = Conv(x, k) d = Constant<value_float = 2.0>() e = Neg(d) m = Mul(c, e) y = Relu(m) }"


@pytest.mark.parametrize("version", [11, 17, 20, 23])
def test_the_graph_is_prepared_and_compared_with_the_file(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "m.onnx", CONV, opset=version, ir_version=10, weights={"k": (4, 3, 3, 3), "left": (300,)})
    artifact = deploy.export(tmp_path / "out", onnx=path)
    made = graph(artifact)
    assert [node.op_type for node in made.node] == ["Conv", "Mul", "Relu"]
    assert all(node.name for node in made.node)
    assert len(made.initializer) == 2
    assert opset(artifact) == max(version, 19)
    parity = artifact.manifest.parity
    assert parity is not None
    assert parity.against == "file"
    assert len(parity.cases) > 3
    check_same(artifact, path, {"x": np.random.default_rng(1).normal(size=(2, 3, 9, 7)).astype(np.float32)})
    assert deploy.export(tmp_path / "again", onnx=artifact.onnx_path).manifest.parity is None  # nothing is left to be done


@pytest.mark.parametrize(
    ("text", "inputs", "outputs"),
    [
        ("g (float[n, 3, h, w] x) => (float[p, q] y) { c = Conv(x, k) y = Relu(c) }", "nx3xhxw", 4),
        ("g (float[n, 3, 8, 8] x) => (float[1, 4, 6, 6] y) { c = Conv(x, k) y = Relu(c) }", "nx3x8x8", "nx4x6x6"),
        (
            "g (float[n, 3, 8, 8] x, int64[2] s) => (float[n, 2] y) { c = Conv(x, k) d = Shape(c) y = Reshape(c, d) }",
            "nx3x8x8",
            4,
        ),
    ],
)
def test_declared_shapes_that_are_wrong_are_put_right(tmp_path: Path, text: str, inputs: str, outputs: str | int) -> None:
    path = write(tmp_path / "m.onnx", text, weights={"k": (4, 3, 3, 3)})
    manifest = deploy.export(tmp_path / "out", onnx=path).manifest
    assert str(manifest.inputs[0]) == f"x: float32 {inputs}"
    spec = manifest.outputs[0]
    assert (len(spec.shape) if isinstance(outputs, int) else str(spec)) == (
        outputs if isinstance(outputs, int) else f"y: float32 {outputs}"
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Upsample<mode = 'nearest'>(c, f) y = Relu(a)",
        "a = Upsample<mode = 'linear'>(c, f) y = Relu(a)",
        "a = Resize<mode = 'linear'>(c, f) y = Relu(a)",
    ],
)
def test_an_opset_is_raised_only_where_the_results_stay(tmp_path: Path, body: str) -> None:
    text = f"g (float[n, 3, h, w] x) => (float[n, 4, p, q] y) <float[4] f = {{1, 1, 2, 3}}> {{ c = Conv(x, k) {body} }}"
    version = 10 if "Resize" in body else 9
    path = write(tmp_path / "m.onnx", text.replace("'", '"'), opset=version, weights={"k": (4, 3, 3, 3)})
    artifact = deploy.export(tmp_path / "out", onnx=path)
    assert opset(artifact) == 19
    check_same(artifact, path, {"x": np.random.default_rng(1).normal(size=(1, 3, 9, 7)).astype(np.float32)})


def test_a_file_that_does_not_run_on_made_up_input_is_taken_as_it_is_or_compared_on_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "m.onnx",
        "g (float[n, c] x) => (float[n, q] y) <int64[2] s = {-1, 6}> { a = Reshape(x, s) d = Concat<axis = 1>(a, x) y = Relu(d) }",
    )
    artifact = deploy.export(tmp_path / "out", onnx=path)
    assert artifact.onnx_path.read_bytes() == path.read_bytes()
    assert "is taken as it is, for it does not run on made-up input" in caplog.text
    (tmp_path / "feeds").mkdir()
    np.savez(tmp_path / "feeds" / "0.npz", x=np.ones((2, 6), np.float32))
    artifact = deploy.export(tmp_path / "out", onnx=path, data=tmp_path / "feeds")
    assert opset(artifact) == 19
    np.savez(tmp_path / "feeds" / "0.npz", x=np.ones((2, 5), np.float32))
    with pytest.raises(PrecisionError, match=r"m\.onnx does not run on `data`: "):
        deploy.export(tmp_path / "out", onnx=path, data=tmp_path / "feeds")
    assert opset(Artifact.open(tmp_path / "out")) == 19  # as it was
    with pytest.raises(UsageError):
        deploy.export(tmp_path / "out", onnx=path, data=tmp_path / "feeds", static_batch=True)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("g (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { y = Relu(c) c = Conv(x, k) }", {}),  # not in order
        (
            "g (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { c = Conv(x, k) y = LayerNormalization<axis = 3>(c, s) }",
            {"s": (6, 1)},
        ),
        ("g (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { c = Conv(x, k) y = Relu(c) }", {"ir_version": 3}),
        ("g (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { c = Conv(x, k) y = Relu(c) }", {"name": ""}),
    ],
    ids=["order", "an operator that ONNX did not have yet", "IR version 3", "a graph without a name"],
)
def test_what_onnx_runtime_runs_and_the_checker_refuses_goes_through_every_stage(
    tmp_path: Path, text: str, changes: dict[str, Any]
) -> None:
    weights = {"k": (4, 3, 3, 3)}
    path = write(tmp_path / "m.onnx", text, opset=16, weights=weights)
    model = onnx.load(path)
    if "s" in changes:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.float32), "s"))
    if "name" in changes:
        model.graph.name = ""
    if "ir_version" in changes:
        model.ir_version, model.opset_import[0].version = 3, 8
    onnx.save(model, path)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    feed = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    CpuGraph.read(path)(feed)
    source = deploy.export(tmp_path / "out", onnx=path)
    check_same(source, path, feed)
    for index, given in enumerate((path, source)):
        deploy.convert(given, tmp_path / f"fp16-{index}", precision="fp16")
        deploy.quantize(given, tmp_path / f"int8-{index}", calib=[feed])


def rankless(path: Path, version: int = 20) -> Path:
    """A file that does not say the rank of `x`, and that of `k` it does; as it is it holds nothing to prepare at opset 20."""
    text = "g (float[N, 4] x, float[N, 3] k) => (float[N, 3] y) { [m] h = MatMul(x, w) [a] y = Add(h, k) }"
    write(path, text, opset=version, ir_version=10, weights={"w": (4, 3)})
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("version", [13, 20])
def test_an_input_without_a_rank_has_the_shape_that_is_given(version: int, tmp_path: Path) -> None:
    path = rankless(tmp_path / "m.onnx", version)
    with pytest.raises(ArtifactError, match=r"rank of its input 'x': .* `deploy export --onnx m\.onnx --input x=SHAPE`"):
        deploy.export(tmp_path / "out", onnx=path)
    artifact = deploy.export(tmp_path / "out", onnx=path, inputs=["x=Nx4"])
    assert [str(spec) for spec in artifact.manifest.inputs] == ["x: float32 Nx4", "k: float32 Nx3"]
    bare = deploy.open_artifact(artifact.onnx_path)  # the file says it too
    assert bare.manifest.inputs == artifact.manifest.inputs
    rng = np.random.default_rng(0)
    check_same(artifact, path, {"x": rng.random((5, 4), np.float32), "k": rng.random((5, 3), np.float32)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z=Nx4", "has no input 'z'; it has x, k"),
        ("k=Nx3", r"says the shape of 'k', \[N,3\]: leave `inputs` k out"),
        ("x=Nx4:int64", "the file says the dtype"),
        ("x=NxMx9", "does not run with x NxMx9 on made-up input: .*; give feeds with `data`"),
    ],
)
def test_a_shape_that_an_input_cannot_have_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = rankless(tmp_path / "m.onnx")
    with pytest.raises((UsageError, PrecisionError), match=message):
        deploy.export(tmp_path / "out", onnx=path, inputs=[text])
    assert not (tmp_path / "out").exists()


DECODES = """
import numpy as np

def good(outputs):
    return [(boxes, np.full(len(boxes), 0.5), np.zeros(len(boxes), int)) for boxes in outputs["y"]]

def of_another_model(outputs):
    return outputs["boxes"]

def number(outputs):
    return 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_another_model", r"decodes\.py:of_another_model fails: KeyError: 'boxes' \(.*decodes\.py:8\)"),
        ("number", r"must return one \(boxes, scores, labels\) an image; for \d images it returns an int"),
    ],
)
def test_a_function_of_boxes_that_does_not_fit_the_outputs_is_known_at_once(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path / "m.onnx", "g (float[n, 5, 4] x) => (float[n, 5, 4] y) { y = Relu(x) }", opset=17)
    (tmp_path / "decodes.py").write_text(DECODES)
    with pytest.raises(UserCodeError, match=message):
        deploy.export(tmp_path / "out", onnx=path, decode=f"{tmp_path}/decodes.py:{name}")
    assert not (tmp_path / "out").exists()
    good = deploy.export(tmp_path / "out", onnx=path, decode=f"{tmp_path}/decodes.py:good")
    assert str(good.manifest.decode) == "decodes.py:good"

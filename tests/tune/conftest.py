"""A small network of three units, and images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.writer import ArtifactWriter
from deploy.progress import Progress
from deploy.tune import measure, search
from deploy.tune import tune as stage
from deploy.tune.measure import Stopwatch
from deploy.tune.search import Built

SIDE, CLASSES = 12, 4


@pytest.fixture(scope="package")
def net(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_net(tmp_path_factory.mktemp("net") / "net")


def small_net(out: Path, outlier: float = 1) -> Artifact:
    """A convolution, one with a residual sum, and a matrix, with random weights; the second one reads a channel at `outlier` times the others, and
    takes that back."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng.standard_normal((8, 1, 3, 3)) * 0.5,
        "w2": rng.standard_normal((8, 8, 3, 3)) * 0.2,
        "w3": rng.standard_normal((8, CLASSES)) * 2,
    }
    arrays["w1"][0] *= outlier
    arrays["w2"][:, 0] /= outlier
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="stem/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="stem/Relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="body/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="Add"),
        helper.make_node("Relu", ["s"], ["r2"], name="body/Relu"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="head/Gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with ArtifactWriter(out) as writer:
        onnx.save(model, writer.path / ONNX)
        manifest = open_onnx(writer.path / ONNX).manifest
        preprocess = Preprocess(channels=1, crop=SIDE, mean=(0.5,))
        return writer.commit(msgspec.structs.replace(manifest, name="net", preprocess=preprocess))


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`calib` and `eval`, of 32 and 64 images of noise of several contrasts; their classes mean nothing."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    for index in range(96):
        pixels = 128 + rng.normal(0, 15 + index, (SIDE, SIDE)) + rng.normal(0, 40)
        folder = root / ("calib" if index % 3 == 0 else "eval") / str(index % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="package")
def quick() -> Iterator[None]:
    """Few and short rounds, whose outcome is not left to the machine: the safest mix is 1.1 times as fast, the next 1.2 times, and so on."""
    timed = stage.time_points

    def with_speeds(watch: Stopwatch, points: Sequence[Built], progress: Progress) -> tuple[list[Built], float]:
        found, p50_ms = timed(watch, points, progress)
        assert all(each.point.speedup for each in found if each.artifact is not None)
        speeds = [1.1 + 0.1 * index for index in range(len(found))]
        return [
            each.found(speedup=s, low=s - 0.01, high=s + 0.01, faster=True) for each, s in zip(found, speeds, strict=True)
        ], p50_ms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ROUNDS", 2)
        patch.setattr(measure, "LONGEST_S", 0.5)
        patch.setattr(measure, "SLICE_S", (0.005, 0.005))
        patch.setattr(search, "PROFILES", 1)
        patch.setattr(stage, "time_points", with_speeds)
        yield

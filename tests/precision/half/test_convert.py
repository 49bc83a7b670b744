"""A graph in half precision, in memory, and its parity with the FP32 graph."""

import msgspec
import numpy as np
import onnx
import onnx_ir
import pytest
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.preprocess import Preprocess
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.convert import convert_onnx
from tests.precision.half.artifacts import make_artifact

FP16 = ConvertOptions(precision="fp16")


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "net")


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_a_fixed_batch_is_compared_at_that_batch(tmp_path, images):
    path = tmp_path / "fixed.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[3, 1, 8, 8] image) => (float[3, 1, 8, 8] y) { y = Neg(image) }'
    )
    onnx.save(model, path)
    bare = open_artifact(path)
    artifact = Artifact(bare.path, msgspec.structs.replace(bare.manifest, preprocess=Preprocess(channels=1)), bare.bare)
    parity = convert_onnx(artifact, ConvertOptions(precision="fp16", data=images)).parity
    assert [(case.data, case.batch) for case in parity.cases] == [("random", 3)] * 3 + [("images", 3)]


def test_progress_is_told(artifact):
    told = []
    convert_onnx(artifact, FP16, lambda what, done=0, total=0: told.append((what, done, total)))
    assert ("reading activation ranges", 2, 3) in told
    assert ("comparing with FP32 on random input, batch 5", 0, 0) in told


def test_the_graph_can_be_had_without_an_artifact(artifact, tmp_path):
    made = convert_onnx(artifact, FP16)
    made.save(tmp_path / "typed.onnx")
    assert onnx.load(tmp_path / "typed.onnx") == onnx_ir.to_proto(made.model)
    assert [spec.name for spec in (*made.inputs, *made.outputs)] == ["image", "scores"]

import os

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from PIL import Image

from deploy.artifact import tensors
from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.summary import summary
from deploy.artifact.tensors import ShapeRange
from deploy.errors import ArtifactError, OutputError, ParityError, PrecisionError, UsageError
from deploy.evidence.parity import Tolerance
from deploy.host.versions import tool_versions
from deploy.pipeline import convert, stage
from deploy.pipeline.convert import convert_artifact
from deploy.precision.formats import ConvertOptions
from deploy.precision.half import convert as entry
from deploy.precision.half import rewrite as half
from deploy.precision.half.convert import convert_onnx
from tests.precision.half.artifacts import make_artifact, write_graph

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


def test_an_operator_that_cannot_be_run_is_named_with_its_file(tmp_path):
    path = tmp_path / "odd.onnx"
    graph = '<ir_version: 10, opset_import: ["": 20, "acme": 1]> g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) [odd] y = acme.Odd(a) }'
    onnx.save(onnx.parser.parse_model(graph), path)
    with pytest.raises(
        PrecisionError, match=r"odd\.onnx cannot be compared with: .* node 'odd': it is operator Odd of domain acme"
    ):
        convert_artifact(open_artifact(path), tmp_path / "half", FP16)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_artifact_says_what_it_is_and_where_it_comes_from(artifact, tmp_path, precision):
    made = convert_artifact(artifact, tmp_path / "build" / "net-half", ConvertOptions(precision=precision))
    manifest = Artifact.open(tmp_path / "build" / "net-half").manifest
    made.verify()
    assert manifest == made.manifest
    assert (manifest.kind, manifest.precision, manifest.name, manifest.stage.name) == ("onnx", precision, "net-half", "convert")
    assert (manifest.parent.path, manifest.parent.digest) == (os.path.join("..", "..", "net"), artifact.manifest.digest)
    assert made.parent().manifest == made.root().manifest == artifact.manifest
    assert manifest.inputs == artifact.manifest.inputs
    assert manifest.outputs == artifact.manifest.outputs
    assert manifest.profiles == artifact.manifest.profiles
    assert manifest.source == artifact.manifest.source
    assert list(manifest.files) == ["model.onnx"]
    assert {"deploy", "onnx", "onnxruntime"} <= set(manifest.tools)
    assert manifest.exclusions == []
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(made.payload).graph.initializer}
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    assert (weights["w"], weights["v"]) == (half, half)


def test_parity_is_with_the_parent_at_three_batch_sizes(artifact, tmp_path):
    parity = convert_artifact(artifact, tmp_path / "half", FP16).manifest.parity
    assert parity.against == artifact.manifest.digest
    assert parity.by == f"emulation on onnxruntime {onnxruntime.__version__}"
    assert [(case.data, case.batch) for case in parity.cases] == [("random", 1), ("random", 2), ("random", 5)]
    assert 0 < parity.worst.max_rel < 2e-3
    assert parity.worst.cosine > 0.99999


def test_the_artifact_runs_in_onnxruntime(artifact, tmp_path):
    made = convert_artifact(artifact, tmp_path / "half", FP16)
    image = np.random.default_rng(5).standard_normal((3, 1, 8, 8), dtype=np.float32)
    expected, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
        for path in (artifact.payload, made.payload)
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_the_accuracy_of_the_parent_is_not_claimed(tmp_path):
    artifact = make_artifact(tmp_path / "net", accuracy={"top1": 99.0}, classes=["a", "b", "c"])
    manifest = convert_artifact(artifact, tmp_path / "half", FP16).manifest
    assert manifest.accuracy is None
    assert manifest.classes == ["a", "b", "c"]


def test_with_fp16_io_inputs_and_outputs_are_fp16(artifact, tmp_path):
    manifest = convert_artifact(artifact, tmp_path / "half", ConvertOptions(precision="fp16", fp16_io=True)).manifest
    assert [str(spec) for spec in manifest.inputs] == ["image: float16 batchx1x8x8"]
    assert [str(spec) for spec in manifest.outputs] == ["scores: float16 batchx3"]


def test_a_bare_onnx_file_converts_and_is_named_as_the_parent(tmp_path):
    path = write_graph(tmp_path / "bare.onnx")
    made = convert_artifact(open_artifact(path), tmp_path / "half", FP16)
    assert made.manifest.parent.path == os.path.join("..", "bare.onnx")
    assert made.parent() is None
    assert convert_artifact(open_artifact(path), tmp_path / "half", FP16).manifest.created == made.manifest.created
    write_graph(path, body="d = Neg(c)")
    with pytest.raises(ArtifactError, match=r"has changed: .*bare\.onnx"):
        made.parent()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"no file at .*bare\.onnx"):
        made.parent()


def test_what_stands_is_not_made_again_and_other_options_make_it_again(artifact, tmp_path, monkeypatch):
    first = convert_artifact(artifact, tmp_path / "half", FP16)
    inode = first.payload.stat().st_ino
    assert convert_artifact(artifact, tmp_path / "half", FP16).payload.stat().st_ino == inode
    other = convert_artifact(artifact, tmp_path / "half", FP16, Tolerance(rtol=0.5, atol=0.0))
    assert other.payload.stat().st_ino != inode
    assert other.manifest.parity.tolerance.rtol == 0.5
    convert_artifact(artifact, tmp_path / "half", FP16)
    with monkeypatch.context() as patch:
        for module in (convert, stage):
            patch.setattr(module, "tool_versions", lambda: {**tool_versions(), "onnxruntime": "0.0.1"})
        assert convert_artifact(artifact, tmp_path / "half", FP16).manifest.tools["onnxruntime"] == "0.0.1"
    damaged = convert_artifact(artifact, tmp_path / "half", FP16)
    damaged.payload.write_bytes(b"")
    convert_artifact(artifact, tmp_path / "half", FP16).verify()


def test_what_overflows_or_vanishes_stays_fp32_and_is_reported(tmp_path):
    artifact = make_artifact(
        tmp_path / "net",
        body="[up] u = Mul(c, big) [root] r = Sqrt(u2) d = Mul(r, s)".replace("[root]", "[square] u2 = Mul(u, u) [root]"),
        weights={"big": np.array(1e3, dtype=np.float32), "s": np.array(1e-9, dtype=np.float32)},
    )
    made = convert_artifact(artifact, tmp_path / "half", FP16).manifest
    reasons = {exclusion.node: exclusion.reason for exclusion in made.exclusions}
    assert "output 'u2' reaches" in reasons["square"]
    assert "input 'u2' reaches" in reasons["root"]
    assert any("weight 's' of at most 1e-09 vanishes" in reason for reason in reasons.values())
    assert "conv" not in reasons
    assert "up" not in reasons


def test_a_planted_overflow_fails_and_nothing_is_written(tmp_path, monkeypatch):
    artifact = make_artifact(
        tmp_path / "net", body="s = Mul(c, big) [square] u = Mul(s, s) d = Sqrt(u)", weights={"big": np.float32([1e3])}
    )
    standing = convert_artifact(artifact, tmp_path / "half", FP16)  # protected by its ranges
    monkeypatch.setattr(half, "nodes_to_keep", lambda *_: {})
    with pytest.raises(ParityError, match=r"'scores' is off by inf at batch 1 on random input.*try bf16"):
        convert_artifact(artifact, tmp_path / "half", FP16, Tolerance(rtol=0.9, atol=0.0))
    with pytest.raises(ParityError):
        convert_artifact(artifact, tmp_path / "new", FP16)
    assert Artifact.open(tmp_path / "half").manifest == standing.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "net", "net.onnx"]
    convert_artifact(artifact, tmp_path / "new", ConvertOptions(precision="bf16"))  # has the range


def test_more_error_than_the_tolerance_allows_fails(artifact, tmp_path):
    with pytest.raises(ParityError, match="allowed"):
        convert_artifact(artifact, tmp_path / "half", FP16, Tolerance(rtol=1e-7, atol=0))
    assert not (tmp_path / "half").exists()


def test_real_images_give_ranges_and_parity(tmp_path, images):
    preprocess = Preprocess(channels=1, scale=1.0)  # 0 to 255, where random input is about 0 to 4
    artifact = make_artifact(tmp_path / "net", body="s = Mul(c, c) d = Neg(s)", preprocess=preprocess)
    assert not convert_artifact(artifact, tmp_path / "random", FP16).manifest.exclusions
    options = ConvertOptions(precision="fp16", data=images)
    made = convert_artifact(artifact, tmp_path / "images-too", options)
    assert made.manifest.exclusions
    assert [(case.data, case.batch) for case in made.manifest.parity.cases] == [("images", size) for size in (1, 2, 5)]
    inode = made.payload.stat().st_ino
    assert convert_artifact(artifact, tmp_path / "images-too", options).payload.stat().st_ino == inode
    Image.new("L", (8, 8), 7).save(images / "one" / "0.png")
    assert convert_artifact(artifact, tmp_path / "images-too", options).payload.stat().st_ino != inode


def test_ranges_of_random_numbers_are_said_to_be_such(artifact, tmp_path, images, caplog):
    made = convert_artifact(artifact, tmp_path / "half", FP16)
    assert "come from random numbers alone: give real input with `data`" in caplog.text
    assert "ranges     from random numbers alone" in summary(made)
    caplog.clear()
    real = make_artifact(tmp_path / "real", preprocess=Preprocess(channels=1))
    made = convert_artifact(real, tmp_path / "other", ConvertOptions(precision="fp16", data=images))
    convert_artifact(artifact, tmp_path / "wide", ConvertOptions(precision="bf16"))
    assert "random numbers" not in caplog.text
    assert "random numbers" not in summary(made)


def test_images_without_a_preprocessing_are_refused(artifact, tmp_path, images):
    with pytest.raises(UsageError, match="--preprocess"):
        convert_artifact(artifact, tmp_path / "half", ConvertOptions(precision="fp16", data=images))


def test_other_symbolic_dimensions_take_their_sizes_from_the_profile(tmp_path, monkeypatch):
    artifact = make_artifact(tmp_path / "net", height="H")
    assert artifact.manifest.profiles == []
    shapes = []
    original = tensors.random_feed
    monkeypatch.setattr(
        tensors, "random_feed", lambda *args, **options: shapes.append(original(*args, **options)["image"].shape) or original(*args, **options)
    )  # fmt: skip
    profile = {"image": ShapeRange(min=(1, 1, 5, 8), opt=(4, 1, 12, 8), max=(8, 1, 20, 8))}
    made = convert_onnx(artifact, None, ConvertOptions(precision="fp16", profile=profile))
    assert {(1, 1, 12, 8), (2, 1, 12, 8), (5, 1, 12, 8)} <= set(shapes)
    assert [str(spec) for spec in made.inputs] == ["image: float32 batchx1xHx8"]
    assert convert_artifact(artifact, tmp_path / "half", FP16).manifest.precision == "fp16"  # sizes as at the export


def test_an_output_that_is_not_finite_in_fp32_is_an_error_with_the_node(tmp_path):
    artifact = make_artifact(tmp_path / "net", body="[root] r = Sqrt(c) d = Neg(r)")
    with pytest.raises(
        PrecisionError, match=r"NaN or infinity in output 'scores' in FP32 already, first in node 'root' \(Sqrt\)"
    ):
        convert_artifact(artifact, tmp_path / "half", FP16)


def test_only_undamaged_fp32_onnx_artifacts_are_taken(artifact, tmp_path):
    half = convert_artifact(artifact, tmp_path / "half", FP16)
    with pytest.raises(UsageError, match=r"half is fp16 already; give the FP32 artifact"):
        convert_artifact(half, tmp_path / "again", FP16)
    engine = Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, kind="engine"))
    with pytest.raises(UsageError, match="is an engine"):
        convert_artifact(engine, tmp_path / "again", FP16)
    with pytest.raises(OutputError, match="choose another `out`"):
        convert_artifact(artifact, artifact.path, FP16)
    data = bytearray(artifact.payload.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.payload.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        convert_artifact(artifact, tmp_path / "again", FP16)


def test_an_output_directory_of_somebody_else_is_refused_before_any_work(artifact, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    monkeypatch.setattr(entry, "convert_onnx", lambda *_: pytest.fail("worked before looking"))
    with pytest.raises(OutputError, match="not an artifact of deploy"):
        convert_artifact(artifact, tmp_path / "notes", FP16)


@pytest.mark.parametrize(("dtype", "said"), [("int64", True), ("float", False)])
def test_whole_numbers_that_bf16_may_not_hold_are_warned_about(dtype, said, tmp_path, caplog):
    """Nothing tells how large the integers are, and made-up ones are small."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g ({dtype}[N, 4] x) => (float[N, 2] y)
        <float[4, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ f = Cast<to = 1>(x) y = MatMul(f, w) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    convert_artifact(open_artifact(tmp_path / "net.onnx"), tmp_path / "out", ConvertOptions(precision="bf16"))
    assert ("BF16 holds whole numbers up to 256, and x was tried with 0 to 9 alone" in caplog.text) == said

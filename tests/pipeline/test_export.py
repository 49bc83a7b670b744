"""The stage `export`: what goes into the artifact, parity, lineage, and what is skipped."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST, ONNX, WEIGHTS
from deploy.errors import ArtifactError, ExportError, ParityError, UsageError
from deploy.intake.build import rebuild
from deploy.models.registry import ARCHITECTURES


def write_package(folder: Path) -> None:
    package = folder / "nets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("from torch.nn import Linear\n")
    (package / "small.py").write_text("from .parts import Linear\ndef make():\n    return Linear(6, 3)\n")


@pytest.mark.parametrize("spec", ["nets.small:make", "nets/small.py:make"])
def test_a_project_that_moved_is_exported_again_and_can_be_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spec: str
) -> None:
    write_package(tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    first = deploy.export(tmp_path / "out", model=spec, inputs=["x=1x6"])
    with caplog.at_level("INFO", "deploy"):
        assert deploy.export(tmp_path / "out", model=spec, inputs=["x=1x6"]) == first
    assert caplog.text.count("is up to date") == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    with caplog.at_level("INFO", "deploy"):
        second = deploy.export(tmp_path / "out", model=spec, inputs=["x=1x6"])
    assert caplog.text.count("is up to date") == 1
    assert {Path(file.path).parents[1].name for file in second.manifest.source.files} == {"after"}
    feed = {"x": np.ones((2, 6), dtype=np.float32)}
    with deploy.load(second, "eager") as eager, deploy.load(second, "onnxruntime") as session:
        (expected,), (found,) = eager.run(feed).values(), session.run(feed).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_manifest_says_where_the_artifact_comes_from(tmp_path: Path) -> None:
    weights = tmp_path / "trained.pth"
    torch.save({"state_dict": ARCHITECTURES["lenet5"].create(num_classes=7).state_dict()}, weights)
    artifact = deploy.export(tmp_path / "digits", arch="lenet5", weights=weights)
    manifest = artifact.manifest
    assert manifest.name == "digits"
    assert (manifest.kind, manifest.precision, manifest.parent) == ("onnx", "fp32", None)
    assert (manifest.source.factory, manifest.source.weights, manifest.source.random) == ("lenet5", "trained.pth", False)
    assert manifest.source.args["num_classes"] == 7
    assert [str(spec) for spec in manifest.inputs] == ["input: float32 batchx1x28x28"]
    assert [str(spec) for spec in manifest.outputs] == ["logits: float32 batchx7"]
    assert manifest.profiles[0]["input"].opt == (8, 1, 28, 28)
    assert manifest.preprocess is not None
    assert manifest.preprocess.channels == 1
    assert set(manifest.files) == {ONNX, WEIGHTS}
    assert manifest.source.state_dict == manifest.files[WEIGHTS].sha256
    assert manifest.tools["torch"] == torch.__version__.partition("+")[0]


def test_an_export_that_fails_leaves_the_artifact_that_stood_there(lenet5: Artifact) -> None:
    with pytest.raises(ParityError):
        deploy.export(lenet5.path, arch="lenet5", rtol=0, atol=0)
    assert Artifact.open(lenet5.path) == lenet5
    lenet5.verify()


def test_the_same_request_is_skipped_and_another_is_not(tmp_path: Path) -> None:
    first = deploy.export(tmp_path / "out", arch="mlp")
    inode = (tmp_path / "out").stat().st_ino
    assert deploy.export(tmp_path / "out", arch="mlp") == first
    assert (tmp_path / "out").stat().st_ino == inode
    (tmp_path / "out" / WEIGHTS).write_bytes(b"damaged")
    assert deploy.export(tmp_path / "out", arch="mlp").manifest.files == first.manifest.files
    Artifact.open(tmp_path / "out").verify()
    other = deploy.export(tmp_path / "out", arch="mlp", num_classes=4)
    assert other.manifest.outputs[0].shape == ("batch", 4)


def test_random_weights_are_the_same_each_time_and_said_to_be_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = deploy.export(tmp_path / "one", arch="mlp")
    two = deploy.export(tmp_path / "two", arch="mlp")
    assert one.manifest.source.state_dict == two.manifest.source.state_dict
    assert one.manifest.source.random
    assert "the weights of mlp are random" in caplog.text


def test_a_module_of_the_users_own_with_arguments_and_names(project: Path) -> None:
    artifact = deploy.export(
        project / "out", model="net.py:Net", model_args=["width=5"], num_classes=2, inputs=["x=1x6"], outputs=["scores", "hidden"]
    )
    assert [str(spec) for spec in artifact.manifest.outputs] == ["scores: float32 batchx2", "hidden: float32 batchx5"]
    assert [Path(file.path).name for file in artifact.manifest.source.files] == ["net.py"]
    module = rebuild(artifact)
    x = torch.randn(3, 6)
    with deploy.load(artifact) as session, torch.inference_mode():
        result = session.run({"x": x.numpy()})
        np.testing.assert_allclose(result["scores"], module(x)[0].numpy(), atol=1e-5)


def test_without_output_names_the_outputs_are_numbered(project: Path) -> None:
    artifact = deploy.export(project / "out", model="net.py:Net", inputs=["x=1x6"])
    assert [spec.name for spec in artifact.manifest.outputs] == ["output_0", "output_1"]


def test_a_module_of_the_users_own_needs_inputs(project: Path) -> None:
    with pytest.raises(UsageError, match="`inputs` NAME=1x3x224x224"):
        deploy.export(project / "out", model="net.py:Net")
    with pytest.raises(ExportError, match=r"Net cannot run x \(1, 7\): .*net\.py:8 in forward of Net: .*: mat1"):
        deploy.export(project / "out", model="net.py:Net", inputs=["x=1x7"])


def test_a_static_batch_and_another_size(tmp_path: Path) -> None:
    artifact = deploy.export(tmp_path / "out", arch="mobilenet_v1", inputs=["image=1x3x64x96"], static_batch=True)
    assert str(artifact.manifest.inputs[0]) == "image: float32 1x3x64x96"
    assert artifact.manifest.preprocess is not None
    assert artifact.manifest.preprocess.crop == (64, 96)
    assert artifact.manifest.parity is not None
    assert [case.batch for case in artifact.manifest.parity.cases] == [1, 1, 1]


def test_dynamic_height_and_width(tmp_path: Path) -> None:
    artifact = deploy.export(tmp_path / "out", arch="mobilenet_v1", inputs=["input=1x3xHxW"])
    assert artifact.manifest.inputs[0].shape == ("batch", 3, "H", "W")
    assert artifact.manifest.profiles == []
    with deploy.load(artifact) as session:
        assert session(np.zeros((3, 3, 40, 56), np.float32)).shape == (3, 1000)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"resnet34", "resnet50"}))
def test_every_reference_architecture_is_exported_with_batchnorm_folded(name: str, reference: Callable[[str], Artifact]) -> None:
    artifact = reference(name)
    architecture = ARCHITECTURES[name]
    assert [spec.name for spec in artifact.manifest.inputs] == list(architecture.inputs)
    assert [spec.name for spec in artifact.manifest.outputs] == list(architecture.outputs)
    assert all(spec.shape[0] == "batch" for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs))
    graph = onnx.load(artifact.onnx_path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_a_bare_onnx_file_becomes_an_artifact(tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    artifact = deploy.export(tmp_path / "out", onnx=tiny_onnx, classes=tmp_path / "classes.txt")
    assert artifact.manifest.classes == ["cat", "dog", "bird"]
    assert artifact.manifest.source.factory is None
    assert artifact.onnx_path.read_bytes() == tiny_onnx.read_bytes()
    Artifact.open(tmp_path / "out").verify()
    with pytest.raises(UsageError, match="2 names, and the model gives 3"):
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        deploy.export(tmp_path / "out", onnx=tiny_onnx, classes=tmp_path / "classes.txt")


def test_a_bare_onnx_file_keeps_its_external_data(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 64] x) => (float[n, 64] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(64, dtype=np.float32), "w"))
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.weights", size_threshold=0)
    artifact = deploy.export(tmp_path / "out", onnx=tmp_path / "big.onnx")
    (tmp_path / "big.weights").unlink()
    with deploy.load(artifact) as session:
        np.testing.assert_array_equal(session(np.zeros((1, 64), np.float32))[0], np.arange(64))
    with pytest.raises(ArtifactError, match="big"):
        deploy.open_artifact(tmp_path / "big.onnx")


def test_a_users_file_that_changed_is_named_with_both_digests(project: Path) -> None:
    artifact = deploy.export(project / "out", model="net.py:Net", inputs=["x=1x6"])
    recorded = json.loads((artifact.path / MANIFEST).read_text())["source"]["files"][0]["sha256"]
    (project / "net.py").write_text((project / "net.py").read_text() + "# changed\n")
    with pytest.raises(deploy.DeployError, match=rf"net\.py .*{recorded[:12]}"):
        deploy.load(artifact, backend="eager")


@pytest.mark.usefixtures("untouched")
def test_another_number_of_class_names_than_scores_is_found_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UsageError, match="`classes` has 2 names, and the model gives 10 scores"):
        deploy.export(tmp_path / "out", arch="lenet5", classes=tmp_path / "classes.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untouched")
def test_preprocessing_that_does_not_fit_the_input_is_found_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"resize": 32, "crop": 30, "channels": 1}')
    with pytest.raises(
        UsageError, match=r"p\.json does not fit the input: it makes 1x30x30 \(chw\).* takes input: .*batchx1x28x28"
    ):
        deploy.export(tmp_path / "out", arch="lenet5", preprocess=str(tmp_path / "p.json"))
    assert not (tmp_path / "out").exists()


def test_preprocessing_that_does_not_fit_a_bare_onnx_file_is_refused(lenet5: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`preprocess` imagenet does not fit the input: it makes 3x28x28"):
        deploy.export(tmp_path / "out", onnx=lenet5.onnx_path, preprocess="imagenet")
    assert not (tmp_path / "out").exists()

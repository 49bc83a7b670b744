"""The stage build-aoti: what it records, what it compares, what it refuses."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.manifest import PACKAGE, PackageTarget
from deploy.errors import BackendError, DataError, FactoryError, ParityError, UsageError
from deploy.evidence.parity import TOLERANCES
from deploy.runtime.package import target_here


def test_the_manifest_says_what_it_was_compiled_for_and_how_far_it_is_off(package: Artifact) -> None:
    manifest, root = package.manifest, package.root()
    assert (manifest.kind, manifest.precision, manifest.name) == ("package", "fp32", "lenet5")
    assert set(manifest.files) == {PACKAGE}
    assert manifest.package == target_here("cpu")
    assert (manifest.inputs, manifest.outputs, manifest.source) == (
        root.manifest.inputs,
        root.manifest.outputs,
        root.manifest.source,
    )
    assert manifest.preprocess == root.manifest.preprocess
    parity = manifest.parity
    assert parity is not None
    assert (parity.against, parity.by) == ("eager", f"aoti, torch {torch.__version__} on the CPU")
    assert [case.batch for case in parity.cases] == [1, 2, 5, 8]
    assert 0 < parity.worst.max_abs < 1e-5


def test_a_package_that_stands_is_not_built_again(
    package: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deploy.runtime.package.compile_here", lambda *args, **options: pytest.fail("it was compiled"))
    caplog.set_level("INFO")
    assert deploy.build_aoti(package.root(), package.path, device="cpu").manifest == package.manifest
    assert "lenet5 is up to date" in caplog.text


@pytest.fixture
def net(project: Path) -> Artifact:
    return deploy.export("net", model="net.py:Net", inputs=["x=1x6"])


def test_half_precision_keeps_its_inputs_and_outputs_and_is_held_to_its_own_limits(net: Artifact, project: Path) -> None:
    made = deploy.build_aoti(net, precision="bf16", shapes=["x=2x6:4x6:7x6"], device="cpu")
    assert made.path.resolve() == (project / "build" / "net-bf16-aoti").resolve()
    parity = made.manifest.parity
    assert parity is not None
    assert (made.manifest.precision, parity.tolerance) == ("bf16", TOLERANCES["bf16"])
    assert [case.batch for case in parity.cases] == [2, 5, 4]  # of 1, 2 and 5 those within the range, and the optimum
    (project / "net.py").unlink()  # the package needs none of it
    x = np.random.default_rng(0).standard_normal((3, 6), dtype=np.float32)
    with deploy.load(made) as session, deploy.load(net) as reference:
        results, expected = session.run({"x": x}), reference.run({"x": x})
    for name, result in results.items():
        assert result.dtype == np.float32
        assert 0 < np.abs(result - expected[name]).max() < 0.05


def test_a_package_that_is_too_far_off_is_not_written(package: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled_before(module: object, manifest: object, path: Path, **options: object) -> None:
        shutil.copyfile(package.payload, path)

    monkeypatch.setattr("deploy.runtime.package.compile_here", compiled_before)
    out = tmp_path / "out"
    with pytest.raises(
        ParityError, match=r"out in FP32 on aoti, torch .* on the CPU: output 'logits' is off by .*; nothing was written: looser"
    ):
        deploy.build_aoti(package.root(), out, rtol=0.0, atol=0.0, device="cpu")
    assert not out.exists()
    assert deploy.build_aoti(package.root(), out, device="cpu").payload.is_file()


def test_what_cannot_be_compiled_is_refused_before_any_work(
    net: Artifact, package: Artifact, tiny_onnx: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.runtime.package.compile_here", lambda *args, **options: pytest.fail("it was compiled"))
    half = deploy.convert(net, precision="bf16")
    feeds = project / "feeds"
    feeds.mkdir()
    np.savez(feeds / "one.npz", x=np.zeros((1, 6), np.float32))
    with pytest.raises(UsageError, match="is an AOTInductor package; give the FP32 ONNX artifact that it descends from"):
        deploy.build_aoti(package, "out")
    with pytest.raises(UsageError, match="is bf16 already; give the FP32 artifact"):
        deploy.build_aoti(half, "out")
    with pytest.raises(FactoryError, match="came from an ONNX file: there is no eager module to rebuild"):
        deploy.build_aoti(open_artifact(tiny_onnx), "out", device="cpu")
    with pytest.raises(UsageError, match="a package has one range of shapes"):
        deploy.build_aoti(net, "out", shapes=["x=1x6:2x6:3x6", "x=4x6:5x6:6x6"], device="cpu")
    with pytest.raises(DataError, match="no feed of `data` is within the range of `shapes`"):
        deploy.build_aoti(net, "out", shapes=["x=4x6:5x6:6x6"], data=feeds, device="cpu")
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        deploy.build_aoti(net, "out", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no cuda here"):
            deploy.build_aoti(net, "out", device="cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("deploy.pipeline.export_parity.run_eager", lambda *args, **options: pytest.fail("the module ran"))
    with pytest.raises(BackendError, match=r"AOTInductor needs a C\+\+ compiler"):
        deploy.build_aoti(net, "out", device="cpu")
    assert deploy.build_aoti(package.root(), package.path, device="cpu").manifest == package.manifest  # which is there already


@pytest.mark.parametrize("stage", [deploy.convert, deploy.quantize, deploy.build_trt])
def test_no_other_stage_takes_a_package(package: Artifact, tmp_path: Path, stage: object) -> None:
    given = {deploy.convert: {"precision": "fp16"}, deploy.quantize: {"calib": [{}]}, deploy.build_trt: {}}[stage]  # type: ignore[index]
    with pytest.raises(UsageError, match="is an AOTInductor package; give the "):
        stage(package, tmp_path / "out", **given)  # type: ignore[operator]


def test_a_change_of_the_machine_or_the_options_asks_for_another_package(
    package: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BeganError(Exception):
        pass

    def began(*args: object, **options: object) -> None:
        raise BeganError

    monkeypatch.setattr("deploy.runtime.package.compile_here", began)
    with pytest.raises(BeganError):
        deploy.build_aoti(package.root(), package.path, device="cpu", max_autotune=True)

    def elsewhere(device: str, *, max_autotune: bool) -> PackageTarget:
        return msgspec.structs.replace(target_here(device, max_autotune=max_autotune), torch="2.99")

    monkeypatch.setattr("deploy.runtime.package.target_here", elsewhere)
    with pytest.raises(BeganError):
        deploy.build_aoti(package.root(), package.path, device="cpu")

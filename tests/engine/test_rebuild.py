"""An engine that does not fit this machine, built again from the typed ONNX file beside it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE
from deploy.engine.cuda import Gpu
from deploy.engine.flavour import load_flavour
from deploy.engine.rebuild import engine_plan
from deploy.errors import BackendError

Make = Callable[..., Artifact]


def test_an_engine_that_does_not_fit_is_rebuilt_from_its_typed_file_and_kept(
    shared_lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is the real one, of tensorrt-rtx; nothing can load what it builds without a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = deploy.build_trt(shared_lenet5, tmp_path / "engine", precision="fp16", flavour="tensorrt-rtx", cache=False)
    assert engine.manifest.target is not None
    old = msgspec.structs.replace(engine.manifest.target, version="1.2.0")
    stale = dataclasses.replace(engine, manifest=msgspec.structs.replace(engine.manifest, target=old))
    flavour, gpu = load_flavour("tensorrt-rtx"), Gpu(name="Fake GPU", compute_capability="8.9", driver=None)
    with pytest.raises(BackendError, match=r"built with tensorrt-rtx 1.2.0, and 1.7\S* is installed; build it here"):
        engine_plan(stale, flavour, gpu, rebuild=False)
    plan = engine_plan(stale, flavour, gpu, rebuild=True)
    assert len(plan) == pytest.approx(len((engine.path / ENGINE).read_bytes()), rel=0.05)
    (kept,) = (tmp_path / "cache" / "deploy" / "engines").iterdir()
    assert kept.read_bytes() == plan
    kept.write_bytes(b"kept")
    assert engine_plan(stale, flavour, gpu, rebuild=True) == b"kept"


@pytest.mark.parametrize("rebuild", [False, True])
def test_where_the_flavour_does_not_run_nothing_is_rebuilt_and_the_other_flavour_is_named(
    shared_lenet5: Artifact, tmp_path: Path, rebuild: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deploy.build_trt(shared_lenet5, tmp_path / "engine", flavour="tensorrt-rtx")
    monkeypatch.setattr("deploy.engine.rebuild.build_engine", lambda *_, **__: pytest.fail("the build began"))
    h200 = Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.159.04")
    with pytest.raises(BackendError) as caught:
        engine_plan(engine, load_flavour("tensorrt-rtx"), h200, rebuild=rebuild)
    assert str(caught.value).startswith(f"{engine.location} cannot run here: TensorRT-RTX does not run on NVIDIA H200")
    assert "rebuild" not in str(caught.value)


@pytest.mark.parametrize("rebuild", [False, True])
def test_an_engine_in_fp8_does_not_run_on_a_gpu_without_it_and_is_not_rebuilt_there(
    shared_lenet5: Artifact, tmp_path: Path, rebuild: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deploy.build_trt(shared_lenet5, tmp_path / "engine", flavour="tensorrt-rtx")
    manifest = msgspec.structs.replace(engine.manifest, precision="fp8")
    monkeypatch.setattr("deploy.engine.rebuild.build_engine", lambda *_, **__: pytest.fail("the build began"))
    ampere = Gpu(name="NVIDIA A10", compute_capability="8.6", driver="580.159.04")
    with pytest.raises(
        BackendError, match=r"cannot run here: FP8 needs compute capability 8.9 or later, and NVIDIA A10 \(8.6\) is older"
    ):
        engine_plan(dataclasses.replace(engine, manifest=manifest), load_flavour("tensorrt-rtx"), ampere, rebuild=rebuild)

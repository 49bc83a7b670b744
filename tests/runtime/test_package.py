"""Which machines a package runs on, and what is done on others."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import PackageTarget, Parent
from deploy.errors import ArtifactError, BackendError
from deploy.host.cache import ENGINES, cache_folder
from deploy.host.cpu import instruction_sets
from deploy.runtime.load import load, open_session
from deploy.runtime.package import mismatches, target_here

TARGET = PackageTarget(torch="2.14.1", device="cpu", machine="x86_64", instruction_sets=["avx", "avx2"])
ON_GPU = msgspec.structs.replace(TARGET, device="cuda", gpu="NVIDIA H200", compute_capability="9.0")


def other(artifact: Artifact, **changes: Any) -> Artifact:
    """The same package as if it had been compiled for something else."""
    package = msgspec.structs.replace(artifact.manifest.package, **changes)
    return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, package=package))


def test_a_package_is_for_this_torch_and_this_processor(package: Artifact) -> None:
    assert package.manifest.package == target_here("cpu")
    assert package.manifest.package == PackageTarget(
        torch=torch.__version__, device="cpu", machine="x86_64", instruction_sets=instruction_sets()
    )
    assert instruction_sets()


@pytest.mark.parametrize(
    ("target", "changes", "reasons"),
    [
        (TARGET, {}, []),
        (TARGET, {"instruction_sets": ["avx", "avx2", "avx512f"]}, []),
        (TARGET, {"max_autotune": True}, []),
        (TARGET, {"torch": "2.15.0"}, ["compiled by torch 2.14.1, and 2.15.0 is installed"]),
        (TARGET, {"machine": "aarch64", "instruction_sets": []}, ["compiled on x86_64, and this is aarch64"]),
        (TARGET, {"instruction_sets": ["avx"]}, ["compiled for a processor with avx2, which this one lacks"]),
        (ON_GPU, {"gpu": "NVIDIA H100"}, []),
        (
            ON_GPU,
            {"gpu": "NVIDIA A100", "compute_capability": "8.0", "torch": "2.11.0"},
            [
                "compiled by torch 2.14.1, and 2.11.0 is installed",
                "compiled for NVIDIA H200 (compute capability 9.0), and this is NVIDIA A100 (8.0)",
            ],
        ),
    ],
)
def test_the_reasons_why_a_package_cannot_run_name_both_sides(
    target: PackageTarget, changes: dict[str, Any], reasons: list[str]
) -> None:
    assert mismatches(target, msgspec.structs.replace(target, **changes)) == reasons


def test_a_package_of_another_torch_is_refused_before_it_is_loaded(package: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(BackendError) as caught:
        open_session(other(package, torch="2.0.0", instruction_sets=["avx9"]))
    assert str(caught.value) == (
        f"{package.location} does not fit this machine: compiled by torch 2.0.0, and {torch.__version__} is installed; compiled for a"
        " processor with avx9, which this one lacks; build it here, or open it with rebuild=True"
    )


def test_a_package_that_does_not_fit_is_compiled_once_from_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export = deploy.export(tmp_path / "net", arch="mlp")
    with deploy.load(export) as session:
        x = np.random.default_rng(0).standard_normal((3, *session.inputs[0].shape[1:]), dtype=np.float32)
        expected = session(x)
    manifest = msgspec.structs.replace(
        export.manifest,
        kind="package",
        parent=Parent(path="../net", digest=export.manifest.digest),
        files={},
        package=msgspec.structs.replace(TARGET, torch="2.0.0"),
    )
    package = Artifact(tmp_path / "package", manifest)  # stands for one from another machine: no file of it is loaded
    for _ in range(2):
        with load(package, "aoti", "cpu", rebuild=True) as session:
            np.testing.assert_allclose(session(x), expected, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr("deploy.runtime.package.compile_here", lambda *args, **options: pytest.fail("it was compiled again"))
    (kept,) = (cache_folder() / ENGINES).iterdir()
    assert kept.suffix == ".pt2"
    shutil.rmtree(export.path)
    kept.unlink()
    with pytest.raises(ArtifactError, match=r"the parent of .*package cannot be used: no artifact at "):
        load(package, "aoti", "cpu", rebuild=True)

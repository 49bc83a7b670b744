"""What keeps a module from being compiled. Packages that run: `runtime/backends/test_aoti.py`."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config

from deploy.artifact.tensors import ShapeRange, TensorSpec
from deploy.errors import BackendError, ExportError
from deploy.intake import aoti
from deploy.intake.aoti import compile_package
from tests.host.test_compiler import static_compiler

X = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
Y = TensorSpec(name="y", dtype="float32", shape=("batch", 4))
PROFILE = {"x": ShapeRange(min=(1, 4), opt=(1, 4), max=(8, 4))}


def build(module: nn.Module, path: Path, device: str = "cpu") -> None:
    compile_package(
        module.eval(), [X], [Y], path, profile=PROFILE, precision="fp32", device=device, max_autotune=False, user_files=[__file__]
    )


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that the error names
            return x
        return -x


class Fixes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(int(x.shape[0]), 4) * torch.ones(2, 1)  # two rows, whatever the batch


def test_control_flow_on_values_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Branches cannot be exported: .*test_aoti.py:\d+.*depends on the values of a tensor"):
        build(Branches(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_code_fixes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Fixes cannot be exported: .*fixes the dimension .*that should stay dynamic"):
        build(Fixes(), tmp_path / "model.pt2")


def test_without_a_compiler_the_remedy_is_said_before_anything_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"^AOTInductor needs a C\+\+ compiler, and there is none: install g\+\+ .*CXX$"):
        build(Branches(), tmp_path / "model.pt2")


def test_a_package_holds_no_copy_of_the_cxx_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = static_compiler(tmp_path, "static-g++")
    monkeypatch.setenv("CXX", str(static))
    with config.patch({"cpp.cxx": (None, str(static))}):  # torch reads CXX when it is imported
        build(nn.Linear(4, 4), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as package:
        (library,) = [name for name in package.namelist() if name.endswith(".so")]
        assert b"libstdc++.so" in package.read(library)
    monkeypatch.setattr("deploy.host.compiler.shutil.which", lambda name: str(static))
    with pytest.raises(
        BackendError, match=r"static-g\+\+: it puts a copy of the C\+\+ library into every package.*name one in CXX$"
    ):
        build(nn.Linear(4, 4), tmp_path / "other.pt2")


def test_a_gpu_without_the_cuda_toolkit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(BackendError, match=r"headers of the CUDA toolkit, and there are none: .*CUDA_HOME"):
        build(Branches(), tmp_path / "model.pt2", device="cuda")


def test_it_is_traced_at_the_optimum_and_never_with_one_row_of_a_dynamic_batch() -> None:
    def traced(opt: int, high: int) -> tuple[int, ...]:
        profile = {"x": ShapeRange(min=(1, 4), opt=(opt, 4), max=(high, 4))}
        ((spec, shape),) = aoti._example([X], profile)
        assert spec is X
        return shape

    assert traced(8, 32) == (8, 4)
    assert traced(1, 32) == (2, 4)
    assert traced(1, 1) == (1, 4)
    assert aoti._example([TensorSpec(name="x", dtype="float32", shape=(3, 1))], None)[0][1] == (3, 1)

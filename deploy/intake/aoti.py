"""Compiles a torch module ahead of time: torch.export, then AOTInductor, into a package that runs without the module's code."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy.artifact.tensors import Profile, TensorSpec
from deploy.errors import BackendError, ExportError
from deploy.host.compiler import NO_COMPILER, STATIC, cxx_compiler, is_static
from deploy.intake.adaptive_pools import AdaptivePools
from deploy.intake.attribute_names import any_attribute_name
from deploy.intake.call import dynamic_shapes
from deploy.intake.export_errors import explain, fixed_at
from deploy.intake.exporter import flatten_outputs, quiet
from deploy.intake.packed_convolutions import pack_convolutions

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

_SPECIAL = 2
"""torch.export takes a dimension of size 0 or 1 in its example for a fixed one."""


def compile_package(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    *,
    profile: Profile | None,
    precision: str,
    device: str,
    max_autotune: bool,
    user_files: Sequence[str] = (),
) -> None:
    """Compile `module`, which takes its inputs by position, for `device` of this machine, and write the package to `path` (`.pt2`).

    The package takes and returns tensors of the dtypes in `inputs` and `outputs`, contiguous, on the device. In `fp16` and `bf16` the
    whole module is in that precision, and inputs and outputs are cast within. profile: the range of shapes that it will take;
    it is tuned at the optimum. None where all shapes are fixed. `module` itself is moved and cast.

    Raises ExportError for a module that torch.export or AOTInductor cannot handle, BackendError where there is no compiler.
    """
    check_compiler(device)
    half = HALVES.get(precision)
    on_gpu = device != "cpu"
    plain = _Plain(
        module.to(device, half), half, [getattr(torch, spec.dtype) for spec in outputs], images=on_gpu and half is not None
    )
    example = tuple(
        torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device) for spec, shape in _example(inputs, profile)
    )
    shapes = dynamic_shapes(plain, inputs, profile)
    program: torch.export.ExportedProgram | None = None
    where = torch.cuda.device(device) if on_gpu else nullcontext()
    with torch.no_grad(), quiet(), any_attribute_name(), where:
        try:
            with AdaptivePools():
                program = torch.export.export(plain, example, dynamic_shapes=shapes, strict=False)
            _compile(program, path, on_gpu=on_gpu, max_autotune=max_autotune)
        except Exception as error:  # errors of every kind come through
            line = fixed_at(plain, example, {}, shapes, user_files) if program is None else None
            raise ExportError(explain(error, module, program, inputs, (example, {}), user_files, line)) from error


def _compile(program: torch.export.ExportedProgram, path: Path, *, on_gpu: bool, max_autotune: bool) -> None:
    from torch._inductor import aoti_compile_and_package, list_mode_options  # slow to import: the compiler itself
    from torch._inductor.utils import fresh_cache

    settings: dict[str, Any] = {
        # Weights are folded and laid out for oneDNN in advance. On a GPU there is no such layout to gain from.
        "freezing": not on_gpu,
        "post_grad_custom_pre_pass": None if on_gpu else pack_convolutions,
        # The number of threads is that of the process which runs the package, and not of this one.
        "cpp.dynamic_threads": True,
        # One build needs each header once: to precompile them takes longer, and 150 MB a file.
        "aot_inductor.precompile_headers": False,
        "cpp.cxx": (None, cxx_compiler()),
    }
    if on_gpu:
        settings["cpp.vec_isa_ok"] = (
            False  # the sets of the processor are not tried out, each with a compilation: no kernel runs there
        )
    if max_autotune:
        settings |= list_mode_options("max-autotune-no-cudagraphs")
    with tempfile.TemporaryDirectory(prefix="deploy-aoti-", ignore_cleanup_errors=True) as folder:
        with fresh_cache(dir=folder):  # the compiler leaves copies of the weights behind
            made = aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"), inductor_configs=settings)
        shutil.move(made, path)


class _Plain(nn.Module):
    """A module as what a package holds: tensors in by position, a tuple of tensors out, of the dtypes that a manifest lists."""

    def __init__(self, module: nn.Module, half: torch.dtype | None, dtypes: Sequence[torch.dtype], *, images: bool) -> None:
        super().__init__()
        self.module = module.to(memory_format=torch.channels_last) if images else module
        self._half = half
        self._dtypes = tuple(dtypes)
        self._images = images  # rank 4 in channels_last, as the half-precision convolutions of a GPU want it

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = flatten_outputs(self.module(*map(self._adapted, inputs))).values()
        return tuple(x.to(dtype) for x, dtype in zip(results, self._dtypes, strict=True))

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        if self._half is not None and x.is_floating_point():
            x = x.to(self._half)
        return x.contiguous(memory_format=torch.channels_last) if self._images and x.dim() == 4 else x


def _example(inputs: Sequence[TensorSpec], profile: Mapping[str, Any] | None) -> list[tuple[TensorSpec, tuple[int, ...]]]:
    """Each input with the shape that it is traced with: the optimum of the profile, with 2 in place of 1 where it is dynamic."""
    if profile is None:
        return [(spec, spec.concrete({})) for spec in inputs]
    return [
        (
            spec,
            tuple(
                min(max(best, _SPECIAL), high) for best, high in zip(profile[spec.name].opt, profile[spec.name].max, strict=True)
            ),
        )
        for spec in inputs
    ]


def check_compiler(device: str) -> None:
    """Raise BackendError where there is no C++ compiler that will do, or for a GPU no CUDA toolkit: torch's own errors fill a page."""
    with quiet():
        from torch.utils import cpp_extension  # warns where there is a toolkit and no GPU

    compiler = cxx_compiler()
    if compiler is None:
        raise BackendError(f"AOTInductor {NO_COMPILER}")
    if is_static(compiler):
        raise BackendError(f"AOTInductor cannot use {compiler}: {STATIC}")
    if device != "cpu" and cpp_extension.CUDA_HOME is None:
        raise BackendError(
            "AOTInductor builds for a GPU with the headers of the CUDA toolkit, and there are none: install it, or name its folder"
            " in CUDA_HOME"
        )

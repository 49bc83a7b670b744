"""The AOTInductor package that fits this machine: the one in the artifact, or one compiled from the module of its export."""

import platform
import secrets
from pathlib import Path

import torch
from torch import nn

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest, PackageTarget, request_digest
from deploy.errors import BackendError
from deploy.host.cache import ENGINES, cache_folder, trim
from deploy.host.cpu import instruction_sets
from deploy.runtime.tf32 import tf32


def target_here(device: str, *, max_autotune: bool = False) -> PackageTarget:
    """What a package that is compiled now for `device`, `cpu` or `cuda:N`, can run on."""
    on_gpu = device != "cpu"
    gpu = torch.cuda.get_device_properties(device) if on_gpu else None
    return PackageTarget(
        torch=str(torch.__version__),
        device="cuda" if on_gpu else "cpu",
        machine=platform.machine(),
        instruction_sets=instruction_sets(),
        gpu=gpu.name if gpu else None,
        compute_capability=f"{gpu.major}.{gpu.minor}" if gpu else None,
        max_autotune=max_autotune,
    )


def mismatches(target: PackageTarget, here: PackageTarget) -> list[str]:
    """The reasons why a package for `target` cannot run on `here`, one phrase each that names both sides; empty if it can.

    A package is a shared library against the internals of the torch that compiled it; the compiler used every instruction set of
    the processor it ran on (`-march=native`), and kernels for one compute capability.
    """
    reasons = []
    if target.torch != here.torch:
        reasons.append(f"compiled by torch {target.torch}, and {here.torch} is installed")
    if target.machine != here.machine:
        reasons.append(f"compiled on {target.machine}, and this is {here.machine}")
    elif lacking := [name for name in target.instruction_sets if name not in here.instruction_sets]:
        reasons.append(f"compiled for a processor with {', '.join(lacking)}, which this one lacks")
    if target.compute_capability != here.compute_capability:
        reasons.append(
            f"compiled for {target.gpu} (compute capability {target.compute_capability}), and this is {here.gpu}"
            f" ({here.compute_capability})"
        )
    return reasons


def compile_here(module: nn.Module, manifest: Manifest, path: Path, *, device: str, max_autotune: bool) -> None:
    """Compile `module` as `deploy.intake.aoti.compile_package` does, for what `manifest` says and its first profile.

    FP32 means FP32 on a GPU too: TF32 is off meanwhile. Raises what `compile_package` raises.
    """
    from deploy.intake.aoti import compile_package  # loads the compiler, which running a package does not need

    on_gpu = device != "cpu"
    if on_gpu:
        tf32.hold(allow=False)
    try:
        compile_package(
            module,
            manifest.inputs,
            manifest.outputs,
            path,
            profile=next(iter(manifest.profiles), None),
            precision=manifest.precision,
            device=device,
            max_autotune=max_autotune,
            user_files=[file.path for file in manifest.source.files],
        )
    finally:
        if on_gpu:
            tf32.release()


def package_file(artifact: Artifact, device: str, *, rebuild: bool) -> Path:
    """The package of `artifact` or, with `rebuild`, one compiled for `device` of this machine if that does not fit.

    The latter is kept in the cache. Raises BackendError if the package does not fit and `rebuild` is not set; what rebuilding the
    module and compiling it raise.
    """
    target = artifact.manifest.package
    assert target is not None
    here = target_here(device, max_autotune=target.max_autotune)
    problems = mismatches(target, here)
    if not problems:
        return artifact.payload
    if not rebuild:
        raise BackendError(
            f"{artifact.location} does not fit this machine: {'; '.join(problems)}; build it here, or open it with rebuild=True"
        )
    circumstances = {"artifact": artifact.manifest.digest, "target": repr(here)}
    file = cache_folder() / ENGINES / f"{request_digest(circumstances)}.pt2"
    if not file.is_file():
        from deploy.intake.build import rebuild as rebuild_module

        module = rebuild_module(artifact)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{secrets.token_hex(4)}.pt2")
        try:
            compile_here(module, artifact.manifest, draft, device=device, max_autotune=target.max_autotune)
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
        trim(file.parent)
    return file

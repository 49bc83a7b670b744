"""The check, by its manifest, whether an engine can run on this machine. TensorRT itself has no such check."""

from collections.abc import Sequence

from deploy.artifact.manifest import Target
from deploy.engine.cuda import Gpu

_OPEN = "12.0"

_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", _OPEN)
"""What TensorRT-RTX runs on, and all later than the last (TensorRT-RTX 1.7.1's own list, in its error on an NVIDIA H200)."""


_FP8_FROM = "8.9"
"""The first compute capability with FP8: Ada's (TensorRT-RTX, "Working with Quantized Types"; TensorRT-RTX 1.7.1 builds for no older one)."""


def has_fp8(capability: str) -> bool:
    """Whether GPUs of a compute capability compute in FP8."""
    return _number(capability) >= _number(_FP8_FROM)


def fp8_refusal(what: str) -> str:
    """Why FP8 is not built for `what`: a GPU, or a compute capability, that has none."""
    return (
        f"FP8 needs compute capability {_FP8_FROM} or later, and {what} is older: build for one that has it, or quantize in INT8"
    )


def rtx_refusal(gpu: str, capability: str) -> str | None:
    """Why TensorRT-RTX runs no engine at all on a GPU of this name and compute capability; None if it runs some."""
    if targeted(capability, _RTX_CAPABILITIES):
        return None
    refusal = f"TensorRT-RTX does not run on {gpu} (compute capability {capability}), but on {', '.join(_RTX_CAPABILITIES[:-1])}"
    refusal += f" and from {_OPEN} on"
    older = _number(capability) < _number(_RTX_CAPABILITIES[0])  # TensorRT 10 and 11 begin there too (their support matrix)
    return refusal if older else f"{refusal}; engines of the flavour tensorrt run there"


def mismatches(target: Target, version: str, gpu: Gpu) -> list[str]:
    """The reasons why the engine cannot run here, one phrase each that names both sides; empty if it can.

    version: of the installed flavour that the engine needs. A plain `tensorrt` engine runs on the version and the model of
    GPU that it was built with; a version-compatible one on later versions too, a hardware-compatible one on every GPU from
    compute capability 8.0 on (TensorRT documentation, "Version Compatibility" and "Hardware Compatibility"). A
    `tensorrt-rtx` engine runs on the version it was built with, and on the compute capabilities that it was built for.
    """
    reasons = []
    later = target.version_compatible and _number(version) >= _number(target.version)
    if version != target.version and not later:
        reasons.append(f"built with {target.flavour} {target.version}, and {version} is installed")
    if target.flavour == "tensorrt-rtx":
        if target.targets and not targeted(gpu.compute_capability, target.targets):
            reasons.append(
                f"built for compute capability {', '.join(target.targets)}, and {gpu.name} has {gpu.compute_capability}"
            )
    elif target.hardware_compatible:
        if _number(gpu.compute_capability) < (8, 0):
            reasons.append(f"built for compute capability 8.0 and later, and {gpu.name} has {gpu.compute_capability}")
    elif (target.gpu, target.compute_capability) != (gpu.name, gpu.compute_capability):
        reasons.append(
            f"built on {target.gpu} (compute capability {target.compute_capability}), and this is {gpu.name}"
            f" ({gpu.compute_capability})"
        )
    if target.driver and gpu.driver and _number(gpu.driver)[0] < _number(target.driver)[0]:
        reasons.append(f"built with driver {target.driver}, and the older {gpu.driver} is installed")
    return reasons


def targeted(capability: str, targets: Sequence[str]) -> bool:
    """Whether an engine for `targets` has code for `capability`. An engine for 12.0 runs on all later ones too."""
    newest = _number(_OPEN)
    return capability in targets or (_OPEN in targets and _number(capability) >= newest)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())

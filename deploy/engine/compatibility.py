"""Whether an engine fits the machine it is to run on, told from its manifest: TensorRT itself has no such check."""

from collections.abc import Sequence

from deploy.artifact.manifest import Target
from deploy.engine.cuda import Gpu

_OPEN = "12.0"


def mismatches(target: Target, version: str, gpu: Gpu) -> list[str]:
    """What does not fit, a phrase each that names both sides; nothing where the engine can run.

    version: of the installed flavour that the engine is for. A plain `tensorrt` engine runs on the version and the model of
    GPU that it was built with; a version-compatible one on later versions too, a hardware-compatible one on every GPU from
    compute capability 8.0 on (TensorRT documentation, "Version Compatibility" and "Hardware Compatibility"). A
    `tensorrt-rtx` engine runs on the version it was built with, and on the compute capabilities that it was built for.
    """
    found = []
    later = target.version_compatible and _number(version) >= _number(target.version)
    if version != target.version and not later:
        found.append(f"built with {target.flavour} {target.version}, and {version} is installed")
    if target.flavour == "tensorrt-rtx":
        if target.targets and not targeted(gpu.compute_capability, target.targets):
            found.append(f"built for compute capability {', '.join(target.targets)}, and {gpu.name} has {gpu.compute_capability}")
    elif target.hardware_compatible:
        if _number(gpu.compute_capability) < (8, 0):
            found.append(f"built for compute capability 8.0 and later, and {gpu.name} has {gpu.compute_capability}")
    elif (target.gpu, target.compute_capability) != (gpu.name, gpu.compute_capability):
        found.append(
            f"built on {target.gpu} (compute capability {target.compute_capability}), and this is {gpu.name}"
            f" ({gpu.compute_capability})"
        )
    if target.driver and gpu.driver and _number(gpu.driver)[0] < _number(target.driver)[0]:
        found.append(f"built with driver {target.driver}, and the older {gpu.driver} is installed")
    return found


def targeted(capability: str, targets: Sequence[str]) -> bool:
    """Whether an engine for `targets` has code for `capability`: what is built for 12.0 is for all later ones too."""
    newest = _number(_OPEN)
    return capability in targets or (_OPEN in targets and _number(capability) >= newest)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())

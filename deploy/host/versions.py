"""Versions of Python and of installed distributions. Imports none of them."""

import platform
from importlib import metadata


def versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version of Python and of each installed distribution; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # The GPU build of ONNX Runtime is another distribution of the same module.
            found[name] = _version_or_none("onnxruntime-gpu") if name == "onnxruntime" else None
    return found


def _version_or_none(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Versions of the packages that take part in making artifacts."""
    packages = ("deploy", "torch", "onnx", "onnx-ir", "onnxscript")
    found = {name: metadata.version(name) for name in packages}
    return found | {"onnxruntime": versions(("onnxruntime",))["onnxruntime"] or "unknown"}

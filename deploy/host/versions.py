"""Versions of Python, of this package and of other distributions. Imports none of them."""

import platform
from importlib import metadata

from deploy.version import __version__

_TOOLS = ("deploy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino")
"""What the making of an artifact, and its comparison with what it was made from, depends on."""


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution or of its GPU build, `onnxruntime-gpu`; None if neither is installed.

    `deploy` itself need not be installed: it also runs from a checkout.
    """
    if distribution == "deploy":
        return __version__
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def version_of_module(module: str) -> str | None:
    """The version of the distribution that a module, `torchvision.transforms` for example, comes in; None if that is not known."""
    top = module.partition(".")[0]
    if known := version_of(top):
        return known
    return next(map(version_of, metadata.packages_distributions().get(top, [])), None)  # takes a second


def versions(distributions: tuple[str, ...]) -> dict[str, str | None]:
    """The version of Python and of every distribution; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in distributions}}


def tool_versions() -> dict[str, str]:
    """The versions of the packages that take part in making artifacts, `unknown` for one that is not installed."""
    return {name: version_of(name) or "unknown" for name in _TOOLS}

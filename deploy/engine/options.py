"""How to build an engine. Imports none of the libraries that do it."""

import re
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import UsageError
from deploy.options import option


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build an engine.

    timing_cache: builds that run at the same time may share the file.
    targets: empty for `engine.flavour.RTX_TARGETS`.
    """

    opt_level: int | None = option(None, "0 (quick build) to 5 (fast engine).", metavar="N", default="TensorRT's, 3")
    tf32: bool = option(False, "Let FP32 arithmetic round its inputs to TF32: faster, off by about 1e-3.")
    workspace: int | None = option(
        None, "GPU memory in MiB that a layer may use beside its tensors.", metavar="MIB", default="all there is"
    )
    timing_cache: Path | None = option(None, "Tactic timings to read and write (tensorrt only).", metavar="FILE")
    version_compatible: bool = option(False, "An engine that later minor versions run too (tensorrt only).")
    hardware_compatible: bool = option(False, "An engine for any GPU from Ampere on (tensorrt only).")
    strip: bool = option(
        False, "Leave the weights out of the engine file: loading it puts in those of the ONNX file beside it (needs a GPU)."
    )
    targets: tuple[str, ...] = option(
        (),
        "Compute capability to build for, such as 8.6; may be repeated (tensorrt-rtx only).",
        flag="--target",
        metavar="CC",
    )

    def __post_init__(self) -> None:
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise UsageError(f"`opt_level` must be 0 to 5, not {self.opt_level}")
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"`workspace` must be 1 MiB or more, not {self.workspace}")
        for target in self.targets:
            if not re.fullmatch(r"[1-9]\d*\.\d", target):
                raise UsageError(f"`targets` must be compute capabilities such as 8.6, not {target!r}")
        if len(set(self.targets)) < len(self.targets):
            raise UsageError("`targets` names one compute capability twice")

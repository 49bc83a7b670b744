"""The options that name a metric."""

from dataclasses import dataclass
from pathlib import Path

from deploy.artifact.usercode import UserFunction, split_spec
from deploy.errors import UsageError
from deploy.options import option
from deploy.words import did_you_mean

METRICS = ("top1", "top5", "miou", "map", "sqnr", "cosine")
LOWER = "lower:"
IGNORE = 255
"""The value of a mask's pixels that count for nothing, unless another is given: that of PASCAL VOC and Cityscapes."""


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """What accuracy is measured in.

    metric: one of METRICS, or a function of the user's that makes an object with `update(outputs, targets)` and `compute()`.
    ignore_index: of masks, the value of pixels that count for nothing.
    """

    metric: str = option(
        "top1",
        f"{', '.join(METRICS)}, or your own as FILE.py:FUNCTION or pkg.mod:FUNCTION; lower: before it where less is better.",
        metavar="M",
    )
    ignore_index: int = option(IGNORE, "Of masks, the value of pixels that count for nothing.", metavar="N")

    def __post_init__(self) -> None:
        name = self.metric.removeprefix(LOWER)
        if name in METRICS and name != self.metric:
            raise UsageError(f"`metric` {self.metric}: of {name} more is better, and `{LOWER}` is for metrics of your own")
        if name not in METRICS and ":" not in name:
            raise UsageError(
                f"unknown `metric` {name!r}; expected one of {', '.join(METRICS)}, FILE.py:FUNCTION or pkg.mod:FUNCTION"
                f"{did_you_mean(name, METRICS)}"
            )

        if name in METRICS and name != "miou" and self.ignore_index != IGNORE:
            raise UsageError(f"`ignore_index` is of masks, which {name} does not read: leave it out, or name `metric` miou")

    @property
    def own(self) -> str | None:
        """The user's function, as it was named; None for a metric of ours."""
        name = self.metric.removeprefix(LOWER)
        return None if name in METRICS else name

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.metric.startswith(LOWER)

    def function(self) -> UserFunction | None:
        """The record of the user's function. Raises UsageError where there is no such file, UserCodeError."""
        return None if self.own is None else UserFunction.read(self.own)

    def request(self) -> dict[str, object]:
        """All that a score depends on besides the data, as JSON-like values."""
        function = self.function()
        return {"metric": self.metric, "ignore_index": self.ignore_index, "sha256": function.sha256 if function else None}


def folder_of(spec: str) -> Path | None:
    """The folder of the file in `FILE.py:FUNCTION`; None for a module."""
    source, _ = split_spec(spec, "the metric", "FUNCTION")
    return None if isinstance(source, str) else source.parent

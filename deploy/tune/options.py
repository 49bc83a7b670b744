"""The options of a search."""

from dataclasses import dataclass
from pathlib import Path

from deploy.errors import UsageError
from deploy.evaluation.gate import Gate
from deploy.evaluation.options import MetricOptions
from deploy.evidence.options import ToleranceOptions
from deploy.options import option
from deploy.runtime.catalog import split_backend

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TuneOptions(MetricOptions):
    """What may be lost, and where and how long time is measured.

    min_sqnr, min_cosine: the limits of those metrics. batch: None for 1, or the fixed batch of the model.
    """

    eval_folder: Path | None = option(
        None, "What the loss is measured on: other images than those of --calib.", flag="--eval", metavar="DIR|FILE.json"
    )
    max_drop: float | None = option(
        None,
        "Points of the metric that may be lost on the data of --eval; sqnr and cosine have --min-sqnr and --min-cosine instead.",
        metavar="POINTS",
        default="1 of what is in per cent",
    )
    min_sqnr: float | None = option(
        None, "Least signal to noise, in dB, with --metric sqnr.", metavar="DB", default="that of INT8"
    )
    min_cosine: float | None = option(None, "Least cosine, with --metric cosine.", metavar="X", default="that of INT8")
    backend: str = option(AUTO, "Where the artifact is to run: time and accuracy are measured there.", metavar="B")
    shapes: tuple[str, ...] = option(
        (),
        "With --backend tensorrt or tensorrt-rtx: the range of one input's shape, as of `build-trt`.",
        metavar="NAME=MIN:OPT:MAX",
    )
    fp8: bool = option(False, "With these backends: FP8 (E4M3) in place of INT8, from compute capability 8.9 on.")
    batch: int | None = option(None, "Batch size that time is measured at.", metavar="N", default="1")
    minutes: float = option(10.0, "Time for the search; what is measured is kept, and the same command goes on.", metavar="M")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sqnr", "cosine"):
            if vars(self)[f"min_{name}"] is not None and self.metric != name:
                raise UsageError(f"`min_{name}` is of `metric` {name}")
        if self.backend != AUTO:
            named, _ = split_backend(self.backend)
            if named.runs not in ("onnx", "engine") or not named.computes:
                raise UsageError(f"mixes cannot be measured on {self.backend}: name a backend that runs ONNX files or engines")
        if (self.shapes or self.fp8) and not self.runs_engines:
            raise UsageError("`shapes` and `fp8` are for engines: name the `backend` tensorrt or tensorrt-rtx")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"`batch` must be 1 or more, not {self.batch}")
        if not self.minutes > 0:
            raise UsageError(f"`minutes` must be more than 0, not {self.minutes:g}")

    @property
    def runs_engines(self) -> bool:
        return self.backend != AUTO and split_backend(self.backend)[0].runs == "engine"

    def gate(self, backend: str | None) -> Gate:
        """The gate of this metric on `eval_folder`; backend: where floating point is judged, None for any of the CPU."""
        if self.eval_folder is None:
            raise UsageError("`eval_folder` is needed, the images that the loss is measured on")
        limits = ToleranceOptions(min_sqnr=self.min_sqnr, min_cosine=self.min_cosine)
        return Gate(
            folder=self.eval_folder,
            max_drop=self.max_drop,
            backend=backend,
            metric=MetricOptions(metric=self.metric, ignore_index=self.ignore_index),
            certify=True,
            tolerance=limits.tolerance("fp8" if self.fp8 else "int8"),
        )

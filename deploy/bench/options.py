"""The options of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.shapes import read_shapes
from deploy.errors import UsageError
from deploy.evaluation.options import MetricOptions
from deploy.options import option
from deploy.runtime.catalog import AUTO, BACKENDS, split_backend

BASELINE = "eager"
"""The baseline unless another is named."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(MetricOptions):
    """How to benchmark.

    batches: empty for `BATCHES`, or the fixed batch of the artifacts.
    seconds: without start and warm-up. Slow models take longer: every candidate runs in at least `MIN_ROUNDS` rounds. Rounds that
        other programs disturb are measured again, in as much time, and up to 10 s where that is less.
    shapes: an input without one takes the optimum of its profile, or the size of the images that its preprocessing makes.
    threads: of every candidate, eager included; None: the physical cores that may be used.
    device: of every candidate, eager included. `auto` is the GPU for backends that run only there, and the CPU for those that
        run only there; eager and compile run on the GPU if another candidate needs one, else on the CPU.
    loads, scenarios: what every candidate is also measured under, alone and at the first batch size.
    different_models: the inputs and outputs of the artifacts must still be alike.
    """

    backends: tuple[str, ...] = option(
        (),
        f"{', '.join(BACKENDS)}, some with a variant (onnxruntime:cuda, eager:fp16,channels_last); may be repeated.",
        flag="--backend",
        metavar="B",
        default=f"{', '.join(AUTO)}, and for engines their flavour",
    )
    batches: tuple[int, ...] = option((), "Batch sizes.", flag="--batch", metavar="1,8,32", default="1,8,32")
    seconds: float = option(12.0, "Time to spend on measuring.", metavar="S")
    shapes: tuple[str, ...] = option(
        (),
        "Shape of an input with dynamic dimensions, such as x=1x3x224x224; its batch is that of --batch.",
        metavar="NAME=SHAPE",
    )
    baseline: str = option(BASELINE, "What all is compared with, with a variant if any.", metavar="B")
    data: Path | None = option(None, "Images to run on.", metavar="IMAGEFOLDER", default="random numbers")
    evaluate: Path | None = option(
        None, "Measure the accuracy of every candidate on this: see `deploy eval`.", flag="--eval", metavar="DIR|FILE.json"
    )
    logs: Path = option(Path("build/loadgen"), "Where LoadGen's logs go.", metavar="DIR")
    load_seconds: float = option(3.0, "Time of each load and scenario, for each candidate; MLPerf asks for 600.", metavar="S")
    layers: bool = option(False, "Also time the layers, by ONNX node and torch module.")
    skip_missing: bool = option(False, "List a named backend that cannot run here, and measure the rest.")
    different_models: bool = option(False, "Compare artifacts that do not descend from the same state_dict.")
    threads: int | None = None
    device: str = "auto"
    loads: tuple[Load, ...] = ()
    scenarios: tuple[Scenario, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate is None and (self.metric, self.ignore_index) != (MetricOptions().metric, MetricOptions().ignore_index):
            raise UsageError("`metric` and `ignore_index` need `evaluate`, the data that accuracy is measured on")
        for backend in (self.baseline, *self.backends):
            split_backend(backend)
        if split_backend(self.baseline)[0].runs in ("engine", "package"):
            raise UsageError(
                f"`baseline` {self.baseline}: an engine or a package cannot be the baseline; name a backend that runs the export or its module"
            )
        for batch in self.batches:
            if batch < 1:
                raise UsageError(f"the batch size must be 1 or more, not {batch}")
        read_shapes(self.shapes)
        if not self.seconds > 0:
            raise UsageError(f"`seconds` must be more than 0, not {self.seconds:g}")
        if not self.load_seconds > 0:
            raise UsageError(f"`load_seconds` must be more than 0, not {self.load_seconds:g}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"`threads` must be 1 or more, not {self.threads}")


def parse_backends(texts: Sequence[str]) -> tuple[str, ...]:
    """The backends of a command line: one text may name several with commas between them, as variants have too.

    `["onnxruntime:cuda,openvino", "eager:fp16,channels_last"]` -> `("onnxruntime:cuda", "openvino",
    "eager:fp16,channels_last")`: a word after a comma belongs to the variant before it, unless it names a backend.
    """
    backends: list[str] = []
    for text in texts:
        for position, part in enumerate(text.split(",")):
            if position and ":" in backends[-1] and part.partition(":")[0] not in BACKENDS:
                backends[-1] += f",{part}"
            else:
                backends.append(part)
    return tuple(dict.fromkeys(backends))

"""The options of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.shapes import read_shapes
from deploy.errors import UsageError
from deploy.runtime.catalog import BACKENDS, ENGINES, split_backend

BASELINE = "eager"
"""The baseline unless another is named."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to benchmark.

    baseline: the backend, with variants if any, that everything is compared with; it runs the export or its module.
    backends: names from `BACKENDS`, with variants if any (`eager:fp16,channels_last`); empty: all of `AUTO` that are
        installed and can run the artifact. Engines run on their flavour's, and on no other.
    batches: batch sizes; empty: `BATCHES`, or the fixed batch of the artifacts.
    seconds: time to spend on measuring, without start and warm-up. Slow models take longer: every candidate runs in at
        least `MIN_ROUNDS` rounds.
    shapes: `NAME=SHAPE`, such as `input=1x3x224x224`, for inputs with dynamic dimensions; the batch in it is not used. An
        input without one takes the optimum of its profile, or the size of the images that its preprocessing makes.
    threads: threads of every candidate, eager included; None: the physical cores that may be used.
    device: device of every candidate, eager included. `auto` is the GPU for backends that run only there, and the CPU for
        those that run only there; eager and compile run on the GPU if another candidate needs one, else on the CPU.
    data: an ImageFolder whose images are the inputs; None: random numbers.
    evaluate: an ImageFolder to measure the accuracy of every candidate on.
    loads: loads that every candidate is also measured under, alone and at the first batch size, for `load_seconds` each.
    scenarios: scenarios of MLPerf's LoadGen that every candidate also runs, for at least `load_seconds`; logs go below `logs`.
    layers: also time the layers of every candidate, at the first batch size.
    skip_missing: list a named backend that cannot run here, in place of raising an error.
    different_models: allow artifacts of several state_dicts; their inputs and outputs must still be alike.
    """

    baseline: str = BASELINE
    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    seconds: float = 12.0
    threads: int | None = None
    device: str = "auto"
    data: Path | None = None
    evaluate: Path | None = None
    loads: tuple[Load, ...] = ()
    load_seconds: float = 3.0
    scenarios: tuple[Scenario, ...] = ()
    logs: Path = Path("build/loadgen")
    layers: bool = False
    skip_missing: bool = False
    different_models: bool = False

    def __post_init__(self) -> None:
        for backend in (self.baseline, *self.backends):
            split_backend(backend)
        if split_backend(self.baseline)[0] in ENGINES:
            raise UsageError(
                f"`baseline` {self.baseline}: an engine cannot be the baseline; name a backend that runs the export or its module"
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

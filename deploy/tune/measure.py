"""Builds mixes of a network, runs them for their damage, and times them in turns, on the backend that they are for."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from threading import Lock
from typing import Literal, NamedTuple, Protocol

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX, DATA, ONNX, Stage
from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import Feed, Profile, batch_dim, default_dims, random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet
from deploy.engine.profile_choice import holds
from deploy.errors import ParityError, PrecisionError, UsageError
from deploy.evidence.disturbance import Measured, Round, Turn, take_rounds, take_turn, together
from deploy.evidence.parity import TOLERANCES
from deploy.evidence.timing import paired_ratio
from deploy.host.cpu import has_vnni
from deploy.pipeline.quantize import QuantizeStage
from deploy.pipeline.stage import descendant
from deploy.precision.codes import CodesName
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.quantize import CalibratedGraph
from deploy.progress import Progress
from deploy.runtime.catalog import CPU_FORMS, split_backend
from deploy.runtime.layers import named_layers
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.here import WorkerHere
from deploy.runtime.worker.process import WorkerProcess
from deploy.tune.damage import Kind, damage
from deploy.tune.units import Unit

ROWS = 64
"""Rows of the calibration data that damage is measured on."""

BASE = "floating point"
"""What is timed beside all mixes."""
AT_A_TIME = 2
"""Units that are measured at a time on a CPU: a file is written and a session opened by one thread, more or less."""
STAYS = "it is faster or safer in floating point (deploy tune)"
RUNS, SLICE_S = 3, (0.015, 0.06)
"""Runs of floating point that a turn should have, and between what its seconds may be: what a machine does to times lasts for tenths of a second, and does
the same to both of two short turns that follow each other. Of each turn, 10 ms are not timed: runs that warm up, and the pause behind it."""
ROUNDS = 10
"""Rounds after which it is looked whether they are enough."""
PRECISE = 0.02
"""The standard error of the time of a mix that is enough, as a share of that in floating point, or of its own if that is longer."""
LONGEST_S = 6.0
"""Seconds after which no more rounds than the first are taken, however far off their times may be; twice as many where more might show what is not clear."""
SHOWN = 0.99
"""The confidence of the interval that shows a mix to be faster: more than 95 %, for several mixes are looked at, and again after more rounds."""
_STAGE = Stage(name="tune", request="")
_SAMPLES = 500
_SETTLE_S = 0.0
"""A turn begins with runs that are not timed, and what is not settled after the first window settles in the first rounds: they are few of many."""
_PATIENCE = 2.0
"""How many times the seconds of the planned turns may pass before disturbed rounds are not taken again."""
_Z95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where time is measured: dims are the sizes of the symbolic dimensions of the inputs, that of the batch among them.

    floats, codes: the precisions that are mixed.
    """

    backend: str
    options: SessionOptions
    dims: Mapping[str, int]
    batch: int
    floats: Literal["fp32", "fp16"] = "fp32"
    codes: CodesName = "int8"

    @property
    def runs_engines(self) -> bool:
        return split_backend(self.backend)[0].runs == "engine"

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        backend: str,
        options: SessionOptions,
        batch: int | None,
        profiles: Sequence[Profile] = (),
        codes: CodesName = "int8",
    ) -> "Place":
        """profiles: of the engines, where the backend runs those; what is not in codes is in FP16 then.

        Raises UsageError where a dimension has no size, or where the batch of the model is fixed at another size, or outside all profiles.
        """
        manifest = artifact.manifest
        dim = batch_dim(manifest.inputs)
        first = manifest.inputs[0].shape[:1]
        size = batch or 1 if dim is not None else next((each for each in first if isinstance(each, int)), 1)
        if batch not in (None, size):
            raise UsageError(f"{artifact.shown} has a fixed batch of {size}: it cannot be timed at `batch` {batch}")
        image = manifest.preprocess.shape if manifest.preprocess else None
        known = {dim: size} if dim is not None else {}
        remedy = "export it with fixed sizes, or with a preprocessing that crops"
        dims = default_dims(manifest.inputs, profiles or manifest.profiles, image, known=known, remedy=remedy)
        if not profiles:
            return cls(backend=backend, options=options, dims=dims, batch=size)
        place = cls(backend=backend, options=options, dims=dims, batch=size, floats="fp16", codes=codes)
        shapes = place.shapes(artifact)
        if not any(holds(profile, shapes) for profile in profiles):
            raise UsageError(f"an engine of these `shapes` takes no `batch` {size}")
        return place

    def shapes(self, artifact: Artifact) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs."""
        return {
            spec.name: tuple(self.dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            for spec in artifact.manifest.inputs
        }


class Mixes(Protocol):
    """Mixes of a network, as they run at a place.

    base: in floating point alone. graph: what is quantized. at_a_time: how many threads may call `damage_alone` at a time.
    """

    base: Artifact
    graph: CalibratedGraph
    place: Place
    at_a_time: int

    def placement(self) -> Placement:
        """Where pairs go if every layer is quantized that can be."""

    def build(self, name: str, stay: Sequence[str]) -> Artifact:
        """The network in codes but for the nodes of `stay`, without evidence: for measuring alone.

        Raises PrecisionError, ParityError, OutputError, EngineError and BackendError.
        """

    def damage(self, mix: Artifact) -> float:
        """What a mix does to the outputs, as it runs: see `tune.damage`. Raises BackendError."""

    def damage_alone(self, name: str, stay: Sequence[str]) -> float:
        """What the codes of the nodes that are not in `stay` do to the outputs.

        Raises what `build` does, and BackendError.
        """

    def proved(self, mix: Artifact, stay: Sequence[str]) -> Artifact:
        """A mix, and its nodes in floating point, with its evidence: the same files, and maybe a CPU form besides.

        Raises PrecisionError, ParityError, OutputError, EngineError and BackendError.
        """


class OnnxMixes:
    """Mixes that run as ONNX files: INT8 and FP32.

    source: the network in floating point, as it is. feeds: what damage is measured on. folder: the mixes are in folders in it.
    """

    def __init__(
        self,
        source: Artifact,
        data: CalibrationSet,
        graph: CalibratedGraph,
        place: Place,
        feeds: Sequence[Feed],
        kind: Kind,
        folder: Path,
        progress: Progress,
    ) -> None:
        options = graph.options
        self._stage = QuantizeStage(source, data, options, TOLERANCES[options.precision], None, progress, cpu_form=True)
        self.base = source
        self.graph = graph
        self.place = place
        self.folder = folder
        self._feeds = feeds
        self._kind: Kind = kind
        self._expected = self._outputs(source)
        named, variant = split_backend(place.backend)
        self.at_a_time = 1 if named.needs_gpu(variant) or place.options.device.startswith("cuda") else AT_A_TIME
        self._building = Lock()  # weights in a file beside the source are mapped by whoever reads them first

    def placement(self) -> Placement:
        return self.graph.placement()

    def build(self, name: str, stay: Sequence[str]) -> Artifact:
        form = self.place.backend == CPU_FORMS and has_vnni()
        with self._building, ArtifactWriter(self.folder / name) as writer:
            quantized = self.graph.quantized(stay=dict.fromkeys(stay, STAYS), cpu=form)
            for function in self.base.manifest.functions:
                function.copy(self.base.path, writer.path)
            save_model(quantized.model, writer.path / ONNX)
            if quantized.cpu is not None:
                try:
                    quantized.cpu.save(writer.path / CPU_ONNX)
                except (ParityError, PrecisionError):  # `quantize` would leave it out as well
                    for file in (CPU_ONNX, CPU_ONNX + DATA):
                        (writer.path / file).unlink(missing_ok=True)
            changes = {"precision": "int8", "parity": None, "exclusions": quantized.exclusions}
            return writer.commit(descendant(self.base, writer.out, _STAGE, calibration=quantized.calibration, **changes))

    def damage(self, mix: Artifact) -> float:
        return damage(self._expected, self._outputs(mix), self._kind)

    def damage_alone(self, name: str, stay: Sequence[str]) -> float:
        alone = self.build(name, stay)
        found = self.damage(alone)
        shutil.rmtree(alone.path)
        return found

    def proved(self, mix: Artifact, stay: Sequence[str]) -> Artifact:
        """Built anew, as `quantize` builds."""
        with ArtifactWriter(self.folder / f"{mix.path.name}-proved") as writer:
            for function in self.base.manifest.functions:
                function.copy(self.base.path, writer.path)
            make = partial(self.graph.quantized, stay=dict.fromkeys(stay, STAYS), cpu=True)
            return writer.commit(self._stage.write(writer, _STAGE, make))

    def _outputs(self, artifact: Artifact) -> list[Feed]:
        return outputs(artifact, self.place.backend, self.place.options, self._feeds)


def outputs(artifact: Artifact, backend: str, options: SessionOptions, feeds: Sequence[Feed]) -> list[Feed]:
    """What an artifact makes of each feed. Raises BackendError."""
    with open_session(artifact, backend, options) as session:
        return [dict(session.run(feed)) for feed in feeds]


class Stopwatch:
    """Times artifacts in processes of their own, which take turns; leaves none behind.

    The artifacts of `always` stay open, and are in every measurement. The processes of the others are kept for those of the next one, for it takes longer
    to start a process than to open a session.
    """

    def __init__(self, place: Place, always: Mapping[str, Artifact]) -> None:
        self._place = place
        with ExitStack() as stack:  # closes what was opened where one cannot be
            self._stack = stack
            self._kept: list[WorkerProcess] = []
            self._always = self._opened(always)
            self._run_s = max(worker.prepare(place.dims).run_s for worker in self._always.values())
            self._stack = stack.pop_all()

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, mixes: Mapping[str, Artifact], is_clear: Callable[[Measured[str]], bool] = lambda _: True) -> Measured[str]:
        """Rounds in which all run equally long, `ROUNDS` and as many again until they are `PRECISE` and clear, or for `LONGEST_S`. Raises BackendError.

        Each is in an order of its own: what a turn leaves in the caches is another's gain or loss. What is always there has two turns in each, for
        all the others are compared with it.
        """
        opened = self._opened(mixes)
        workers = self._always | opened
        random = Random(0)  # noqa: S311  (chosen to repeat, not to be secret)
        slice_s = min(max(RUNS * self._run_s, SLICE_S[0]), SLICE_S[1])
        begin = time.monotonic()
        taken: list[Round[str]] = []

        def take(_: int) -> Round[str]:
            order = [*workers, *self._always]
            random.shuffle(order)
            turns: dict[str, list[Turn]] = {name: [] for name in workers}
            for name in order:
                turns[name].append(_turn(workers[name], slice_s))
            return Round({name: _joined(each) for name, each in turns.items()})

        while True:
            count = len(taken) + ROUNDS
            start = time.monotonic()
            planned_s = ROUNDS * (len(workers) + len(self._always)) * slice_s
            take_rounds(take, count, taken, min(start + _PATIENCE * planned_s, begin + 2 * LONGEST_S))
            measured = Measured.of(taken, count)
            after_s = 2 * time.monotonic() - start - begin  # as many more rounds
            enough = after_s > LONGEST_S or _is_precise(measured, mixes)
            if after_s > 2 * LONGEST_S or (enough and is_clear(measured)):
                break
        self._kept += opened.values()
        return measured

    def _opened(self, artifacts: Mapping[str, Artifact]) -> dict[str, WorkerProcess]:
        workers = {name: self._opening(artifact) for name, artifact in artifacts.items()}
        for worker in workers.values():
            worker.wait_open()
        for worker in workers.values():
            worker.ask_prepare(self._place.dims, _SETTLE_S)
        for worker in workers.values():
            worker.wait_prepared()
        return workers

    def _opening(self, artifact: Artifact) -> WorkerProcess:
        if not self._kept:
            kind = WorkerHere if self._place.runs_engines else WorkerProcess
            return self._stack.enter_context(kind(artifact, self._place.backend, self._place.options))
        worker = self._kept.pop(0)
        worker.reopen(artifact)
        return worker


def _joined(turns: Sequence[Turn]) -> Turn:
    """Several turns of one in a round as one."""
    return Turn(samples_s=[*chain.from_iterable(turn.samples_s for turn in turns)], use=together(turn.use for turn in turns))


def _is_precise(measured: Measured[str], mixes: Iterable[str]) -> bool:
    shares = [time_share(measured, name) for name in mixes]
    return all(share.error <= PRECISE * max(1.0, share.value) for share in shares)


def _turn(worker: WorkerProcess, slice_s: float) -> Turn:
    return take_turn(worker.pid, worker.threads, lambda: worker.round(slice_s, _SAMPLES, warm_up=True))


def is_faster(measured: Measured[str], name: str) -> bool | None:
    """Whether the rounds show a mix to be faster than floating point: its interval in rounds in which others did the same to both.

    None where it had better times, and more rounds might show it.
    """
    ratio = paired_ratio(measured.samples_s(BASE), measured.samples_s(name), confidence=SHOWN)
    return True if ratio.low > 1 else None if ratio.value > 1 else False


class Share(NamedTuple):
    """A time as a share of that in floating point, in the same rounds, and its standard error."""

    value: float
    error: float


def time_share(measured: Measured[str], name: str) -> Share:
    """That of a mix, for the cost model: what others did to all alike makes no difference there, and is not in the error."""
    ratio = paired_ratio(measured.samples_s(BASE), measured.samples_s(name))
    return Share(1 / ratio.value, (1 / ratio.low - 1 / ratio.high) / (2 * _Z95))


def profiled(artifacts: Sequence[Artifact], place: Place, units: Sequence[Unit], times: int) -> list[np.ndarray]:
    """Of each artifact (units,) the shares of its time that go to the units, by the profiler of the backend: medians of so many profiles, in turns.

    A layer of several units counts for the first; what is in no unit, for none. Raises BackendError where the backend has no profiler.
    """
    owners = {node: index for index, unit in enumerate(units) for node in unit.nodes}
    found: list[list[np.ndarray]] = [[] for _ in artifacts]
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(artifact, place.backend, place.options)) for artifact in artifacts]
        feeds = [random_feed(session.inputs, place.dims) for session in sessions]
        for _ in range(times):
            for artifact, session, feed, shares in zip(artifacts, sessions, feeds, found, strict=True):
                layers = named_layers(artifact, session.onnx_file, session.layer_times(feed))
                spent = np.zeros(len(units))
                for layer in layers:
                    owner = next((owners[node] for node in layer.nodes if node in owners), None)
                    if owner is not None:
                        spent[owner] += layer.ms
                shares.append(spent / max(sum(layer.ms for layer in layers), math.ulp(0.0)))
    return [np.median(shares, axis=0) for shares in found]

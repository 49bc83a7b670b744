"""The rounds of a benchmark: all candidates in turns, and the rows that come of their samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.plan import Candidate
from deploy.bench.rows import UNCERTAIN, BenchRow, verdict_of
from deploy.bench.workers import Workers
from deploy.evidence.disturbance import Measured, Round, Turn, Use, take_rounds, take_turn
from deploy.evidence.parity import difference
from deploy.evidence.timing import latency
from deploy.host.core_probe import CoreState
from deploy.host.nvidia_smi import gpu_watched
from deploy.runtime.catalog import recorded_accuracy, size_run
from deploy.runtime.profiling import DeviceTimes

ROUNDS = 15
MIN_ROUNDS = 5
SAMPLES_A_ROUND = 500


class Run:
    """The rounds of one benchmark.

    rows: what has been measured. inputs: by batch size, how many inputs and of how many bytes. gpu: its states during the rounds.
    uses: what others did to the baseline, by batch size. cores: as they were, if known. repeated: rounds that were taken beyond those planned, in the place of others.
    """

    def __init__(self, workers: Workers, folder: Path) -> None:
        self.rows: list[BenchRow] = []
        self.inputs: dict[str, dict[str, int]] = {}
        self.gpu: list[dict[str, str]] = []
        self.uses: list[Use] = []
        self.cores: list[CoreState] = []
        self.repeated = 0
        self._workers = workers
        self._folder = folder
        self._first_s: dict[Candidate, float] = {}

    def measure(self, batch: int, seconds: float) -> None:
        """Measure all candidates that take this batch size, in turns, for `seconds`; longer where rounds are disturbed (`disturbance.PATIENCE_S`).

        Ctrl-C keeps whole rounds, if enough.
        """
        run_s = self._warm_up(batch)
        errors = self._errors(list(run_s))
        timed = self._workers.still(list(run_s))
        device = next((candidate.device for candidate in timed if candidate.device != "cpu"), None)
        slice_s = seconds / (ROUNDS * len(timed))
        count = int(seconds / sum(max(run_s[candidate], slice_s) for candidate in timed) + 0.5)
        count = min(max(count, MIN_ROUNDS), ROUNDS)
        rounds: list[Round[Candidate]] = []
        try:
            with gpu_watched(device, self.gpu):
                take_rounds(lambda turn: self._round(batch, timed, slice_s, turn, count), count, rounds)
        except KeyboardInterrupt:
            if len(rounds) >= MIN_ROUNDS:  # fewer prove nothing
                self._add_rows(batch, rounds, count, errors, {}, {})
            raise
        still = self._workers.still(timed)
        memory = {candidate: self._workers.ask(candidate, lambda process: process.memory()) for candidate in still}
        on_gpu = [candidate for candidate in self._workers.still(still) if candidate.device != "cpu"]
        times = {candidate: self._workers.ask(candidate, lambda process: process.device_times()) for candidate in on_gpu}
        self._add_rows(batch, rounds, count, errors, memory, times)

    def _warm_up(self, batch: int) -> dict[Candidate, float]:
        """Seconds of a run of each candidate once its times have settled; outputs are written for `_errors`."""
        run_s: dict[Candidate, float] = {}
        for candidate in self._workers.running(batch):
            prepared = self._workers.prepare(candidate, batch, f"batch {batch}: warm up", self._outputs(candidate))
            if prepared is not None:
                run_s[candidate] = prepared.run_s
                self._first_s.setdefault(candidate, prepared.first_s)
                self.inputs[str(batch)] = {"inputs": prepared.inputs, "bytes": prepared.input_bytes}
        return run_s

    def _round(self, batch: int, timed: Sequence[Candidate], slice_s: float, turn: int, count: int) -> Round[Candidate]:
        """A round of those that are still there, in an order that rotates."""
        self._workers.progress(f"batch {batch}" if turn < count else f"batch {batch}, disturbed: again", turn % count, count)
        running = self._workers.still(timed)
        shift = turn % len(running)
        turns: Round[Candidate] = Round()
        for candidate in running[shift:] + running[:shift]:
            taken = self._workers.ask(candidate, lambda process: self._turn(process, slice_s))
            if taken is not None:
                turns[candidate] = taken
        return turns

    def _turn(self, process: CandidateProcess, slice_s: float) -> Turn:
        return take_turn(process.pid, process.threads, lambda: process.round(slice_s, SAMPLES_A_ROUND))

    def _add_rows(
        self,
        batch: int,
        rounds: Sequence[Round[Candidate]],
        count: int,
        errors: Mapping[Candidate, float | None],
        memory: Mapping[Candidate, tuple[int, int | None] | None],
        device: Mapping[Candidate, DeviceTimes | None],
    ) -> None:
        baseline = self._workers.baseline
        still = self._workers.still(list(rounds[0]))
        measured = Measured.of([turns.only(still) for turns in rounds], count)
        self.uses.append(measured.use(baseline))
        if measured.cores is not None:
            self.cores.append(measured.cores)
        self.repeated += max(0, len(rounds) - count)
        for candidate in still:
            host, gpu = memory.get(candidate) or (0, None)
            self.rows.append(
                replace(
                    _row(candidate, batch, measured, baseline),
                    max_abs_error=errors[candidate],
                    first_ms=self._first_s[candidate] * 1e3,
                    load_s=self._workers.load_s[candidate],
                    peak_bytes=host,
                    gpu_bytes=gpu,
                    **(asdict(times) if (times := device.get(candidate)) is not None else {}),
                )
            )

    def _outputs(self, candidate: Candidate) -> Path:
        return self._folder / f"{id(candidate)}.npz"

    def _errors(self, candidates: Sequence[Candidate]) -> dict[Candidate, float | None]:
        """The largest difference of each candidate's outputs to the baseline's; the files are removed."""
        with np.load(self._outputs(self._workers.baseline)) as expected:
            reference = list(expected.values())
        errors: dict[Candidate, float | None] = {}
        for candidate in candidates:
            path = self._outputs(candidate)
            with np.load(path) as file:
                outputs = list(file.values())
            path.unlink()
            if [x.shape for x in outputs] != [x.shape for x in reference]:
                self._workers.fail(candidate, "its outputs have other shapes than those of the baseline")
                continue
            largest = max(difference(x, wanted).max_abs for x, wanted in zip(outputs, reference, strict=True))
            errors[candidate] = largest if math.isfinite(largest) else None
        return errors


def _row(candidate: Candidate, batch: int, measured: Measured[Candidate], baseline: Candidate) -> BenchRow:
    """The figures of the samples; the caller fills in the rest."""
    series = measured.samples_s(candidate)
    samples_ms = [value * 1e3 for value in chain.from_iterable(series)]
    times = latency(samples_ms)
    speed = measured.ratio(baseline, candidate)
    accuracy = recorded_accuracy(candidate.artifact, candidate.backend)
    certain = measured.certain(candidate) and measured.certain(baseline)
    use = measured.most_disturbed(candidate, baseline)
    cores = measured.cores
    return BenchRow(
        **candidate.named,
        batch=batch,
        p50_ms=times.p50,
        p90_ms=times.p90,
        p99_ms=times.p99,
        p999_ms=times.p999,
        mean_ms=times.mean,
        images_per_s=batch / times.mean * 1e3,
        speedup=speed.value,
        speedup_low=speed.low,
        speedup_high=speed.high,
        verdict="baseline" if candidate is baseline else verdict_of(speed) if certain else UNCERTAIN,
        certain=certain,
        uncertain_because=None if certain else measured.reason(candidate, baseline),
        others_cores=use.others_cores,
        waited_share=use.waited_share,
        step_ns=cores.step_ns if cores else None,
        handoff_us=cores.handoff_us if cores else None,
        max_abs_error=None,
        first_ms=0.0,
        load_s=0.0,
        peak_bytes=0,
        gpu_bytes=None,
        size_bytes=size_run(candidate.artifact, candidate.backend),
        top1=accuracy.top1 if accuracy else None,
        top5=accuracy.top5 if accuracy else None,
        accuracy_from="manifest" if accuracy else None,
        score=msgspec.to_builtins(accuracy.judged) if accuracy else None,
        gflops=None,
        roof_gflops=None,
        gpu_ms=None,
        h2d_ms=None,
        d2h_ms=None,
        samples_ms=tuple(round(value, 6) for value in samples_ms),
        rounds=tuple(len(part) for part in series),
    )

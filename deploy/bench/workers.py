"""The processes of all candidates of a benchmark: opened, asked in turns, and closed when they fail."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from deploy.bench.candidate.process import CandidateProcess
from deploy.bench.plan import Candidate, Plan, Skipped
from deploy.errors import BackendError, WorkerDiedError
from deploy.progress import Progress
from deploy.runtime.session import SessionOptions
from deploy.runtime.worker.process import Prepared

T = TypeVar("T")


class Workers:
    """One process for each candidate, the baseline first. `stack` closes them.

    skipped: candidates that cannot run here. failures: candidates that started and broke. load_s: seconds that opening took.
    """

    def __init__(self, plan: Plan, options: SessionOptions, data: Path | None, stack: ExitStack, progress: Progress) -> None:
        self.baseline = plan.baseline
        self.candidates = (plan.baseline, *plan.candidates)
        self.progress = progress
        self.skipped: list[Skipped] = []
        self.failures: list[Skipped] = []
        self.load_s: dict[Candidate, float] = {}
        self._data = data
        progress("start", 0, len(self.candidates))
        self._processes = {
            candidate: stack.enter_context(
                CandidateProcess(candidate.artifact, candidate.backend, replace(options, device=candidate.device))
            )
            for candidate in self.candidates
        }

    def open(self, *, named_artifacts: bool, named_backends: bool) -> None:
        """Wait for all sessions. Candidates that cannot run here are skipped, or, when they were named, raised."""
        for done, (candidate, process) in enumerate(list(self._processes.items())):
            self.progress(f"open {process.label}", done, len(self._processes))
            try:
                self.load_s[candidate] = process.wait_open()
            except BackendError as error:
                died = isinstance(error, WorkerDiedError)
                if candidate is self.baseline or (named_backends and not died):
                    raise
                self._drop(candidate, str(error), self.failures if died else self.skipped)
        if named_artifacts:
            self._check_each_artifact_runs()

    def _check_each_artifact_runs(self) -> None:
        running = {candidate.artifact.shown for candidate in self._processes if candidate is not self.baseline}
        for entry in self.skipped:
            if entry.artifact not in running:
                raise BackendError(f"no backend can run {entry.artifact} here: {entry.backend}: {entry.reason}")

    def running(self, batch: int | None = None) -> list[Candidate]:
        """The candidates that have not failed; with `batch`, those that take this batch size."""
        return [candidate for candidate in self._processes if batch is None or batch in candidate.batches]

    def still(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those of `candidates` that have not failed."""
        return [candidate for candidate in candidates if candidate in self._processes]

    def prepare(self, candidate: Candidate, batch: int, what: str, outputs: Path | None = None) -> Prepared | None:
        """Warm a candidate up at this batch size; None when it failed.

        what: the work that follows, for the progress. outputs: where to write the outputs of the first input.
        """
        self.progress(f"{what} {self._processes[candidate].label}")
        return self.ask(candidate, lambda process: process.prepare(candidate.sizes(batch), outputs, self._data))

    def ask(self, candidate: Candidate, request: Callable[[CandidateProcess], T]) -> T | None:
        """The reply of a candidate's process; None when it failed, which ends its part. Raises for the baseline."""
        try:
            return request(self._processes[candidate])
        except BackendError as error:
            if candidate is self.baseline:
                raise
            self.fail(candidate, str(error))
            return None

    def ask_or_skip(self, candidate: Candidate, request: Callable[[CandidateProcess], T], without: str) -> T | None:
        """As `ask`, but a candidate that refuses is listed as skipped, `without` something, and goes on; only death is a failure."""
        try:
            return request(self._processes[candidate])
        except WorkerDiedError as error:
            self.fail(candidate, str(error))
        except BackendError as error:
            self.skipped.append(candidate.skipped(f"{without}: {error}"))
        return None

    def fail(self, candidate: Candidate, reason: str) -> None:
        """Close a candidate's process and list it among the failures."""
        self._drop(candidate, reason, self.failures)

    def _drop(self, candidate: Candidate, reason: str, into: list[Skipped]) -> None:
        self._processes.pop(candidate).close()
        into.append(candidate.skipped(reason))

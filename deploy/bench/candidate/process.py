"""The parent's side of a candidate's process: the requests of a benchmark besides rounds."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from deploy.bench.candidate.loadgen import Judged, Scenario
from deploy.bench.candidate.traffic import Answered, Load
from deploy.runtime.profiling import DeviceTimes, LayerTime
from deploy.runtime.worker.process import Prepared, WorkerProcess


class CandidateProcess(WorkerProcess):
    """A worker process that also takes traffic, LoadGen's scenarios, real images, and questions about its layers."""

    program = "deploy.bench.candidate.worker"

    def prepare(self, dims: Mapping[str, int], outputs: Path | None = None, data: Path | None = None) -> Prepared:
        """As in every worker process; `data` is an ImageFolder whose images are fed in place of random numbers."""
        return self._prepare({"dims": dict(dims), "outputs": outputs and str(outputs), "data": data and str(data)})

    def load(self, load: Load, seconds: float) -> Answered:
        """The answers under `load` for `seconds`, on the inputs that were prepared last."""
        self._send({"do": "load", "load": asdict(load), "seconds": seconds})
        return Answered(**self._receive())

    def judge(self, scenario: Scenario, rows: int, run_s: float, seconds: float, folder: Path) -> Judged:
        """LoadGen's verdict on the inputs that were prepared last, in batches of up to `rows`; see `loadgen.run_scenario`."""
        asked = {"scenario": asdict(scenario), "rows": rows, "run_s": run_s, "seconds": seconds, "folder": str(folder)}
        self._send({"do": "judge", **asked})
        reply = self._receive()
        return Judged(**{**reply, "reasons": tuple(reply["reasons"])})

    def layers(self) -> tuple[LayerTime, ...]:
        """The layers of a run on the inputs that were prepared last."""
        self._send({"do": "layers"})
        reply = self._receive()["layers"]
        return tuple(
            LayerTime(**{**layer, "nodes": tuple(layer["nodes"]), "modules": tuple(layer["modules"])}) for layer in reply
        )

    def device_times(self) -> DeviceTimes | None:
        """Times of the computation on the GPU and of the copies, for the inputs that were prepared last; None without a GPU."""
        self._send({"do": "device_times"})
        times = self._receive()["times"]
        return DeviceTimes(**times) if times is not None else None

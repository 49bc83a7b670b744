"""The process of a candidate: how it answers the requests of a benchmark besides rounds."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed
from deploy.bench.candidate.inputs import make_feeds
from deploy.bench.candidate.loadgen import Scenario, run_scenario
from deploy.bench.candidate.traffic import Load, put_on
from deploy.runtime.layers import named_layers
from deploy.runtime.session import Session
from deploy.runtime.worker import child


class CandidateWorker(child.Worker):
    """A worker that also takes traffic, LoadGen's scenarios, and questions about its layers."""

    def _answer(self, artifact: Artifact, session: Session, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "load":
            done = put_on(session, Load(**request["load"]), self._feeds.__next__, request["seconds"])
            return {"latencies_s": done.latencies_s, "elapsed_s": done.elapsed_s, "unanswered": done.unanswered}
        if request["do"] == "judge":
            return self._judge(session, request)
        if request["do"] == "layers":
            layers = named_layers(artifact, session.onnx_file, session.layer_times(next(self._feeds)))
            return {"layers": [asdict(layer) for layer in layers]}
        if request["do"] == "device_times":
            times = session.device_times(next(self._feeds))
            return {"times": asdict(times) if times is not None else None}
        return super()._answer(artifact, session, request)

    def _make_feeds(self, artifact: Artifact, session: Session, request: Mapping[str, Any]) -> list[Feed]:
        return make_feeds(artifact, session.inputs, request["dims"], Path(request["data"]) if request.get("data") else None)

    def _judge(self, session: Session, request: dict[str, Any]) -> dict[str, Any]:
        judged = run_scenario(
            session,
            Scenario(**request["scenario"]),
            self._samples,
            most_rows=request["rows"],
            run_s=request["run_s"],
            seconds=request["seconds"],
            folder=Path(request["folder"]),
        )
        return asdict(judged)


def main(parent: int, opened: str) -> None:
    """As `deploy.runtime.worker.child.main`."""
    child.main(parent, opened, CandidateWorker())

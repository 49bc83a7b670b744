"""The models of a server: artifacts that are loaded, replaced and unloaded while requests are answered."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.tensors import TensorSpec, batch_dim, random_feed
from deploy.errors import BackendError, DeployError, ModelNotFoundError, SessionClosedError, UnavailableError, UsageError
from deploy.options import option
from deploy.runtime.batching.batcher import Batcher, BatcherOptions
from deploy.runtime.batching.queue import NORMAL_PRIORITY, Outputs, RequestTimes
from deploy.runtime.load import load
from deploy.runtime.session import Session
from deploy.serving.metrics import Meter
from deploy.serving.source import ModelSource

logger = logging.getLogger("deploy.serving")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are opened and batched: see `deploy.load` and `BatcherOptions`.

    warmup: run every batch size once before requests come.
    """

    allow_code: bool = option(False, "Serve artifacts with code of their user's (--preprocess FILE.py:FUNCTION), and run it.")

    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    batching: BatcherOptions = field(default_factory=BatcherOptions)
    warmup: bool = True


@dataclass(eq=False)
class Served:
    """A loaded version of a model: its artifact, session, batcher and counts."""

    source: ModelSource
    artifact: Artifact
    session: Session
    batcher: Batcher
    meter: Meter

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.session.outputs


def open_served(source: ModelSource, options: ModelOptions, meter: Meter) -> Served:
    """Load and warm up a model. Loading checks the hashes of the files that are run.

    Raises ArtifactError, BackendError, UsageError or UserCodeError.
    """
    artifact = open_artifact(source.path)
    check_code(artifact, options)
    for function in artifact.manifest.functions:
        function.load(artifact.path)  # what is missing is found now, not by the first request
    session = load(artifact, options.backend, options.device, threads=options.threads, contexts=options.batching.instances)
    try:
        batcher = Batcher(session, options.batching, observe=meter.batch)
        try:
            if options.warmup:
                _warm_up(session, batcher)
        except BaseException:
            batcher.close(drain=False)
            raise
    except BaseException:
        session.close()
        raise
    return Served(source=source, artifact=artifact, session=session, batcher=batcher, meter=meter)


def check_code(artifact: Artifact, options: ModelOptions) -> None:
    """Raise UsageError for an artifact that runs code of its user's, where that is not allowed."""
    if artifact.manifest.functions and not options.allow_code:
        listed = ", ".join(map(str, artifact.manifest.functions))
        raise UsageError(f"{artifact.shown} runs code of its user's ({listed}); serve it with `allow_code` if you trust it")


def _warm_up(session: Session, batcher: Batcher) -> None:
    """Run batches of 1, 2, 4 and so on, so that no request is the first of its shape.

    The batches do not go through the batcher, and so are not counted.
    """
    try:
        dims = session.dims()
    except UsageError as error:
        logger.warning("%s is not warmed up: %s", session.name, error)
        return
    batch = batch_dim(session.inputs)
    rows, most = 1, batcher.max_rows or 1
    while True:
        session.run(random_feed(session.inputs, {**dims, batch: rows} if batch and batcher.max_rows else dims))
        if rows == most:
            return
        rows = min(2 * rows, most)


class Models:
    """All models of a server by name and version. Safe to use from the server's event loop and from other threads.

    A request stays with the version that took it: replacing or unloading a version answers all that it has accepted, then closes it.
    """

    def __init__(self, sources: Sequence[ModelSource], options: ModelOptions) -> None:
        seen: set[tuple[str, str]] = set()
        for source in sources:
            if (source.name, source.version) in seen:
                raise UsageError(f"{source.name} version {source.version} is named twice: NAME=PATH@VERSION tells them apart")
            seen.add((source.name, source.version))
        self._sources = {(source.name, source.version): source for source in sources}
        self._options = options
        self._meters = {key: Meter(*key) for key in self._sources}
        self._served: dict[str, dict[str, Served]] = {}
        self._reasons: dict[tuple[str, str], str] = dict.fromkeys(self._sources, "not loaded yet")
        self._lock = threading.Lock()
        self._changing: dict[str, threading.Lock] = {source.name: threading.Lock() for source in sources}
        self.ready = False
        """Whether the server takes requests: it has loaded all models, and is not shutting down."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self._sources))

    @property
    def meters(self) -> tuple[Meter, ...]:
        return tuple(self._meters.values())

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions that are loaded, in ascending order."""
        return tuple(self._served.get(name, {}))

    def get(self, name: str, version: str = "") -> Served:
        """The given version of a model, or the highest. Raises ModelNotFoundError, and UnavailableError if it is not loaded."""
        loaded = self._served.get(name)
        if loaded:
            if not version:
                return next(reversed(loaded.values()))
            if (served := loaded.get(version)) is not None:
                return served
        if name not in self.names:
            raise ModelNotFoundError(f"unknown model {name!r}; expected one of {', '.join(self.names)}")
        known = [number for model, number in self._sources if model == name]
        if version and version not in known:
            raise ModelNotFoundError(f"{name!r} has no version {version!r}; expected one of {', '.join(known)}")
        why = self._reasons.get((name, version or known[-1]), "not loaded")
        raise UnavailableError(f"{name!r} is not ready: {why}")

    def index(self) -> list[dict[str, str]]:
        """The answer of `POST /v2/repository/index`."""
        listed = []
        for name, version in sorted(self._sources, key=lambda key: (key[0], int(key[1]))):
            ready = version in self._served.get(name, {})
            reason = "" if ready else self._reasons.get((name, version), "")
            listed.append({"name": name, "version": version, "state": "READY" if ready else "UNAVAILABLE", "reason": reason})
        return listed

    async def infer(
        self,
        served: Served,
        feed: Mapping[str, np.ndarray],
        *,
        pinned: bool,
        priority: int = NORMAL_PRIORITY,
        timeout_s: float | None = None,
        observe: Callable[[RequestTimes], None] | None = None,
    ) -> tuple[Served, Outputs]:
        """The outputs, and the version that computed them: not `served` if that was replaced before it took the request.

        pinned: the client asked for this version. observe: as `Batcher.run_async` has it. Raises what `Batcher.submit` raises, and
        UnavailableError if it was unloaded.
        """
        came = time.perf_counter()
        while True:
            try:
                return served, await served.batcher.run_async(feed, priority=priority, timeout_s=timeout_s, observe=observe)
            except SessionClosedError:
                now = self.get(served.source.name, served.source.version if pinned else "")
                if now is served:
                    raise UnavailableError(f"{served.source.name!r} is closing") from None
                served = now
            except (DeployError, asyncio.CancelledError) as error:
                if not isinstance(error, DeployError) or not _observed(error):
                    served.meter.failed(error, time.perf_counter() - came)
                raise

    def load_all(self) -> None:
        """Load every model. Raises the error of the first that fails."""
        for name in self.names:
            self.load(name)
        self.ready = True

    def load(self, name: str) -> None:
        """Load all versions of a model from their paths. If one is loaded already, the new one is warmed up and takes its place.

        Raises ModelNotFoundError, and what `open_served` raises; the version that was loaded before then stays.
        """
        with self._changing_of(name):
            for source in [source for (known, _), source in self._sources.items() if known == name]:
                key = (source.name, source.version)
                try:
                    new = open_served(source, self._options, self._meters[key])
                except DeployError as error:
                    self._reasons[key] = str(error)
                    raise
                with self._lock:
                    versions = dict(self._served.get(name, {}))
                    old = versions.get(source.version)
                    versions[source.version] = new
                    self._served[name] = dict(sorted(versions.items(), key=lambda item: int(item[0])))
                    self._meters[key].waiting = lambda batcher=new.batcher: batcher.waiting  # type: ignore[misc]
                    self._reasons.pop(key, None)
                logger.info("loaded" if old is None else "swapped", extra={"model": name, "version": source.version})
                if old is not None:
                    _retire(old)

    def unload(self, name: str) -> None:
        """Remove a model, and wait until it has answered the requests that it accepted. Raises ModelNotFoundError."""
        with self._changing_of(name):
            with self._lock:
                gone = self._served.pop(name, {})
                for version in gone:
                    self._reasons[name, version] = "unloaded"
                    self._meters[name, version].waiting = lambda: 0  # so that the meter does not keep the batcher alive
            for served in gone.values():
                _retire(served)
                logger.info("unloaded", extra={"model": name, "version": served.source.version})

    def close(self) -> None:
        """Unload all models."""
        self.ready = False
        for name in list(self._served):
            self.unload(name)

    def _changing_of(self, name: str) -> threading.Lock:
        if name not in self._changing:
            raise ModelNotFoundError(f"unknown model {name!r}; expected one of {', '.join(self.names)}")
        return self._changing[name]


def _observed(error: DeployError) -> bool:
    """Whether the meter has counted this error already: the batcher reports errors of batches to it."""
    return isinstance(error, BackendError)


def _retire(served: Served) -> None:
    served.batcher.close()
    served.session.close()

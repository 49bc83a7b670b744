"""The session: one opened artifact, whatever runs it; and the table of backends.

A backend is a module of `deploy.runtime` with

    class BackendSession(Session)                                     what it opens
    def open_session(artifact: Artifact, options: SessionOptions) -> Session

Importing it raises BackendError, saying what is missing, where its library is not installed.
"""

import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.tensors import Profile, TensorSpec, default_dims, random_feed
from deploy.errors import BackendError, InputError, SessionClosedError, UsageError
from deploy.runtime.arrays import SORTS, Sort, shape_of, sort_of, writable, write
from deploy.runtime.catalog import BACKENDS, check_variant, refuse_engine
from deploy.runtime.profiling import RUNS, DeviceTimes, LayerTime

_SEEN_SHAPES = 4096


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to open a session.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the GPU where the backend can use one.
    threads: threads of one run; None for the physical cores that the process may use. eager and compile set it for the
        process, and leave torch's own choice where it is None.
    compute: precision of the arithmetic of what the file holds in FP32. `fp32` means FP32; OpenVINO can be asked for
        `bf16` or `fp16`, which is faster and off by about 1e-2.
    contexts: so many runs are under way at a time: execution contexts of an engine at most (None: 2; each takes memory), streams of
        OpenVINO (None: 1), which share its threads: more images a second under load, and each alone takes longer. The other
        backends have one.
    rebuild: where an engine does not fit this machine, build one that does from the typed ONNX file beside it.
    variant: what follows the name of the backend: `("cuda",)` for `onnxruntime:cuda`. See `VARIANTS`.
    """

    device: str = "auto"
    threads: int | None = None
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    contexts: int | None = None
    rebuild: bool = False
    variant: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name, _, index = self.device.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and not (name == "cuda" and index.isdecimal())):
            raise UsageError(f"unknown device {self.device!r}; expected auto, cpu, cuda or cuda:N")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"`threads` must be 1 or more, not {self.threads}")
        if self.compute not in ("fp32", "bf16", "fp16"):
            raise UsageError(f"unknown compute precision {self.compute!r}; expected fp32, bf16 or fp16")
        if self.contexts is not None and self.contexts < 1:
            raise UsageError(f"`contexts` must be 1 or more, not {self.contexts}")


class Session(ABC):
    """An opened artifact. Safe to use from many threads at once.

    A feed maps input names to numpy arrays or torch tensors, all of one sort; the outputs come back as the same sort,
    torch tensors on the device of the inputs. Arrays are never changed and never converted to another dtype.
    """

    backend: ClassVar[str]
    native: ClassVar[Literal["numpy", "torch"]] = "numpy"
    """What `_compute` takes and returns: C-contiguous numpy arrays, or torch tensors on `device`."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    computes: ClassVar[tuple[str, ...]] = ("fp32",)
    """Values of `SessionOptions.device` and `.compute` that the backend takes."""

    device_arrays: ClassVar[bool] = False
    """Whether a feed may be arrays in device memory of other libraries than torch."""

    def __init__(self, artifact: Artifact, options: SessionOptions, *, device: str = "cpu") -> None:
        """Refuses what the backend cannot do. Raises BackendError, or ArtifactError naming a damaged file."""
        self._check_request(artifact, options)
        self.name = artifact.manifest.name
        self.device = device
        self.concurrency = 1
        """Runs that make sense at a time."""
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._describe(artifact.manifest)

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        backend = BACKENDS[self.backend]
        if backend.runs != "engine":
            refuse_engine(artifact)
        check_variant(backend, options.variant)
        if options.device != "auto" and options.device.partition(":")[0] not in self.devices:
            asked = ":".join(filter(None, (self.backend, ",".join(options.variant))))
            raise BackendError(f"{asked} runs on {' or '.join(self.devices)} in this version, not on {options.device}")
        if options.compute not in self.computes:
            raise BackendError(
                f"{self.backend} computes in the precision of the file, not in {options.compute};"
                f" make such a file with `deploy convert --{options.compute}`"
            )
        for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs):
            if spec.dtype == "bfloat16" and self.native == "numpy":
                raise BackendError(f"{self.backend} cannot pass {spec}: numpy has no bfloat16; keep inputs and outputs float32")
        artifact.verify(weights=False)

    def _describe(self, manifest: Manifest) -> None:
        """Take inputs, outputs and profiles from a manifest."""
        self.inputs: tuple[TensorSpec, ...] = tuple(manifest.inputs)
        self.outputs: tuple[TensorSpec, ...] = tuple(manifest.outputs)
        self.profiles: tuple[Profile, ...] = tuple(manifest.profiles)
        self._image = manifest.preprocess.shape if manifest.preprocess else None
        self._input_names = tuple(spec.name for spec in self.inputs)
        self._output_names = tuple(spec.name for spec in self.outputs)
        self._seen: dict[tuple[Any, ...], Sort] = {}  # feeds that passed the checks

    @abstractmethod
    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Run once: checked arrays of the `native` sort by name in, outputs in order out. Thread-safe."""

    def _stop(self) -> None:  # noqa: B027  (most backends have nothing to stop)
        """Called once, before `close` waits for runs under way: wake what would wait for ever."""

    def _release(self) -> None:  # noqa: B027  (a backend with nothing to release need not say so)
        """Let go of what the backend holds. Called once; runs that have begun may still be under way."""

    def run(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run the model on one feed; the outputs by name.

        `out` maps output names to arrays or tensors that the results are written to; they are then what comes back.
        Raises InputError for names, dtypes or shapes other than `inputs` says, SessionClosedError after `close()`,
        BackendError when the backend fails.
        """
        if self._closed:
            raise closed_error(self.name)
        sort = self._sort(feed)
        try:
            if sort == "torch":
                results = self._run_torch(feed)
            elif sort == "device":
                results = self._run_device(feed)
            elif self.native == "torch":
                results = self._run_numpy_on_torch(feed)
            else:
                for x in feed.values():
                    if not x.flags.c_contiguous:  # np.ascontiguousarray would make a scalar a vector
                        feed = {name: np.asarray(x, order="C") for name, x in feed.items()}
                        break
                results = self._compute(feed)
        except MemoryError as error:
            shapes = ", ".join(f"{name} {shape_of(x)}" for name, x in feed.items())
            raise BackendError(f"{self.backend} has no memory to run {self.name!r} on {shapes}: {first_line(error)}") from error
        named = dict(zip(self._output_names, results, strict=True))
        return named if out is None else write(named, out)

    def check(self, feed: Mapping[str, Any]) -> None:
        """Raise what `run` would raise of this feed before it computes anything: InputError, SessionClosedError."""
        if self._closed:
            raise closed_error(self.name)
        self._sort(feed)

    def _sort(self, feed: Mapping[str, Any]) -> Sort:
        """What a feed is made of: looked up where one like it has passed the checks, else checked in full. Raises InputError."""
        key: list[Any] = []
        sort = None
        try:
            for name in self._input_names:
                x = feed[name]
                key += (x.__class__, x.dtype, x.shape)
            if len(feed) == len(self._input_names):
                sort = self._seen.get(tuple(key))
        except (KeyError, AttributeError, TypeError, IndexError):
            pass  # whatever is wrong is named by _check
        if sort is None:
            sort = self._check(feed)
            self._remember(tuple(key), sort)
        return sort

    def _check(self, feed: Mapping[str, Any]) -> Sort:
        """Check a feed in full and say what it is made of. Raises InputError."""
        if not isinstance(feed, Mapping):
            raise InputError(
                f"run() takes arrays by input name, not a {type(feed).__name__}; expected {', '.join(map(str, self.inputs))}"
            )
        self._check_names(feed)
        sorts = {sort_of(name, x, device_arrays=self.device_arrays) for name, x in feed.items()}
        if len(sorts) > 1:
            raise InputError(
                f"the feed mixes {' and '.join(SORTS[sort] for sort in sorted(sorts))}; give all inputs as one of them"
            )
        dims: dict[str, int] = {}
        for spec in self.inputs:
            x = feed[spec.name]
            spec.check(str(x.dtype).removeprefix("torch."), tuple(x.shape), dims)
        sort = sorts.pop() if sorts else "numpy"
        if sort == "numpy" and any(spec.dtype == "bfloat16" for spec in self.outputs):
            raise InputError(f"{self.name!r} returns bfloat16, which numpy lacks; give torch tensors")
        return sort

    def _remember(self, key: tuple[Any, ...], sort: Sort) -> None:
        if len(self._seen) >= _SEEN_SHAPES:
            self._seen.clear()
        self._seen[key] = sort

    def _run_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Torch tensors in, torch tensors on the device of the first of them out."""
        torch = sys.modules["torch"]
        device = feed[self._input_names[0]].device
        if self.native == "torch":
            # What inference mode makes cannot be changed in place outside it; a second tensor on the same memory can.
            results = [torch.from_dlpack(x) for x in self._compute({n: x.to(self.device) for n, x in feed.items()})]
        else:
            arrays = self._compute({name: np.asarray(x.numpy(force=True), order="C") for name, x in feed.items()})
            results = [torch.from_numpy(writable(np.asarray(array))) for array in arrays]
        return [result.to(device) for result in results]

    def _run_device(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Arrays in device memory in and out, where `device_arrays` says that they are taken."""
        raise NotImplementedError

    def _run_numpy_on_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Numpy arrays in and out of a backend that computes on torch tensors."""
        torch = sys.modules["torch"]  # imported by the backend
        results = self._compute({name: torch.from_numpy(writable(x)).to(self.device) for name, x in feed.items()})
        return [result.numpy(force=True) for result in results]

    def _check_names(self, feed: Mapping[str, Any]) -> None:
        missing = [str(spec) for spec in self.inputs if spec.name not in feed]
        unknown = [repr(name) for name in feed if name not in self._input_names]
        if missing or unknown:
            parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
            raise InputError(f"wrong inputs: {'; '.join(parts)}; expected {', '.join(map(str, self.inputs))}")

    def __call__(self, x: Any) -> Any:
        """`run` for a model with one input and one output. Raises InputError for any other model."""
        if len(self._input_names) != 1 or len(self._output_names) != 1:
            raise InputError(
                f"{self.name!r} has {len(self.inputs)} inputs and {len(self.outputs)} outputs: use run() with names"
                f" ({', '.join(self._input_names)})"
            )
        return self.run({self._input_names[0]: x})[self._output_names[0]]

    def dims(self) -> dict[str, int]:
        """Sizes for the symbolic dimensions: those of the first profile's optimum, else of the images that preprocessing makes.

        A batch is 1 where there is no profile. Raises UsageError when a symbolic dimension has neither.
        """
        remedy = "pass a feed of your own, or export with a number there"
        return default_dims(self.inputs, self.profiles, self._image, known={}, remedy=remedy)

    def run_async(self, feed: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """`run` in a thread of the session's own; as many at a time as `concurrency` says, in the order of the calls.

        The arrays of `feed` must stay as they are until the future is done. Raises SessionClosedError after `close()`.
        """
        with self._pool_lock:
            if self._closed:
                raise closed_error(self.name)
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix=f"deploy {self.name}")
            return self._pool.submit(self.run, feed)

    def stream(self, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The outputs of each feed, in order; a few feeds are taken ahead of the output that is read.

        Where a backend can, copies to and from the device and the computation of neighbouring feeds overlap. An iterator that is
        read after `close()` raises SessionClosedError.
        """
        running: deque[Future[dict[str, Any]]] = deque()

        def finish() -> dict[str, Any]:
            if self._closed:
                raise closed_error(self.name)
            try:
                return running.popleft().result()
            except CancelledError:  # by close(), while this waited
                raise closed_error(self.name) from None

        try:
            for feed in feeds:
                running.append(self.run_async(feed))
                if len(running) > self.concurrency:
                    yield finish()
            while running:
                yield finish()
        finally:
            for future in running:
                future.cancel()

    def warmup(self, feed: Mapping[str, Any] | None = None, runs: int = 3) -> None:
        """Run a few times, on `feed` or on random arrays of the optimal shapes, so that the next run is not the first."""
        feed = random_feed(self.inputs, self.dims()) if feed is None else feed
        for _ in range(runs):
            self.run(feed)

    def layer_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> list[LayerTime]:
        """Time of each layer on a feed of numpy arrays, in the order in which they run. Slower than `run`, by the measuring.

        Raises BackendError where the backend cannot tell.
        """
        raise BackendError(f"{self.backend} does not tell the time of its layers")

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        """Time on the GPU and of the copies for a feed of numpy arrays; None where nothing is copied, or it is not told."""
        return None

    def close(self) -> None:
        """Release what the session holds. Runs under way finish; later ones raise SessionClosedError. Twice is fine."""
        with self._pool_lock:
            if self._closed:
                return
            self._closed = True
        self._stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} on {self.device}: {', '.join(map(str, self.inputs))}>"


def closed_error(name: str) -> SessionClosedError:
    return SessionClosedError(f"the session on {name!r} is closed")


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""The session: an opened artifact, with the same interface on every backend.

Each backend has a subclass of `Session` in its file in `deploy/runtime/backends`.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.tensors import Profile, TensorSpec, default_dims, random_feed
from deploy.errors import BackendError, InputError, UsageError
from deploy.runtime.arrays import SORTS, Sort, from_torch, shape_of, sort_of, to_torch, writable, write
from deploy.runtime.catalog import BACKENDS, check_variant, refuse_compiled
from deploy.runtime.profiling import RUNS, DeviceTimes, LayerTime
from deploy.runtime.runner import Runner, closed_error
from deploy.runtime.tasks import TaskPool
from deploy.words import a_type

_SEEN_SHAPES = 4096


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to open a session.

    device: `auto`, `cpu`, `cuda` (which is `cuda:0`) or `cuda:N`. `auto` is the GPU where the backend can use one.
    threads: the number of threads of one run; None for the physical cores that the process may use. eager and compile set it
        for the whole process, and keep torch's own choice if it is None.
    compute: the precision in which FP32 parts of the file are computed. `fp32` means FP32; OpenVINO also takes `bf16` and
        `fp16`, which are faster and off by about 1e-2.
    contexts: the number of runs that may be under way at a time. For an engine, its execution contexts (None: 2; each takes
        memory). For OpenVINO, its streams (None: 1), which share the threads: more images a second under load, but a longer
        time for each. For a package on a GPU, its streams for numpy feeds (None: 2). Other backends ignore it.
    rebuild: if an engine does not fit this machine, build one that does from the typed ONNX file beside it; if a package does not,
        from the module of the export that it descends from, whose factory's code then runs.
    variant: the variants of the backend: `("cuda",)` for `onnxruntime:cuda`.
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


class Session(Runner, ABC):
    """An opened artifact. Safe to use from many threads at once, and in a child of the process that opened it if it is on the CPU.

    A feed maps input names to numpy arrays or to torch tensors, not both; the outputs are of the same sort, and torch tensors
    are on the device of the inputs. Arrays are never changed and never converted to another dtype.
    """

    _instead = (
        "a session cannot be pickled or copied: it belongs to its process; call deploy.load() in the process that uses it, and share"
        " the session between threads"
    )

    backend: ClassVar[str]
    native: ClassVar[Literal["numpy", "torch"]] = "numpy"
    """What `_compute` takes and returns: C-contiguous numpy arrays, or torch tensors on `device`."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    computes: ClassVar[tuple[str, ...]] = ("fp32",)
    """The values of `SessionOptions.device` and `.compute` that the backend accepts."""

    device_arrays: ClassVar[bool] = False
    """Whether a feed may hold device arrays of libraries other than torch, and the backend writes to those of `out` itself."""

    _host_inputs: frozenset[str] = frozenset()
    """Inputs that are read on the host, and may be numpy arrays whatever the sort of the others."""

    def __init__(self, artifact: Artifact, options: SessionOptions, *, device: str = "cpu") -> None:
        """Raises BackendError for what the backend cannot do, and ArtifactError naming a damaged file."""
        super().__init__(device)
        self._check_request(artifact, options)
        self.name = artifact.manifest.name
        self._standing = replace(artifact, path=Path(os.path.abspath(artifact.path)))  # wherever the program moves later
        self.onnx_file = self._standing.onnx_path
        """The ONNX file that is run, or from which what is run was made."""
        self.concurrency = 1
        """The number of runs at a time that make good use of the backend."""
        self._pool: TaskPool | None = None
        self._describe(artifact.manifest)

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        backend = BACKENDS[self.backend]
        if backend.runs in ("onnx", "module"):
            refuse_compiled(artifact)
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
            if spec.dtype == "bfloat16" and self.native == "numpy" and not self.device_arrays:
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
        """Run once on checked arrays of the `native` sort, by name; the outputs in order. Called from many threads at once."""

    def run(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run the model on one feed; the outputs by name.

        `out` maps output names to arrays or tensors to write the results to; those are then returned. Raises InputError for names,
        dtypes or shapes that do not match `inputs`, SessionClosedError after `close()`, BackendError if the backend fails.
        """
        under_way, thread = self._under_way, get_ident()
        under_way.append(thread)
        try:
            if self._barred:
                self._admit()
            sort = self._sort(feed)
            if out is not None and self.device_arrays and sort != "numpy":
                return self._run_into(feed, sort, out)
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
        finally:
            under_way.remove(thread)
        named = dict(zip(self._output_names, results, strict=True))
        return named if out is None else write(named, out)

    def check(self, feed: Mapping[str, Any]) -> None:
        """Raise what `run` would raise for this feed before it computes anything: InputError, SessionClosedError."""
        if self._closed:
            raise closed_error(self.name)
        self._sort(feed)

    def _sort(self, feed: Mapping[str, Any]) -> Sort:
        """The sort of a feed. It is checked in full only if no feed like it has passed the checks before. Raises InputError."""
        key: list[Any] = []
        sort = None
        try:
            for name in self._input_names:
                x = feed[name]
                key += (x.__class__, x.dtype, x.shape)
            if len(feed) == len(self._input_names):
                sort = self._seen.get(tuple(key))
        except (KeyError, AttributeError, TypeError, IndexError):
            pass  # _check names what is wrong
        if sort is None:
            sort = self._check(feed)
            self._remember(tuple(key), sort)
        return sort

    def _check(self, feed: Mapping[str, Any]) -> Sort:
        """Check a feed in full and return its sort. Raises InputError."""
        if not isinstance(feed, Mapping):
            raise InputError(f"run() takes arrays by input name, not {a_type(feed)}; expected {', '.join(map(str, self.inputs))}")
        self._check_names(feed)
        kinds = {name: sort_of(name, x, device_arrays=self.device_arrays) for name, x in feed.items()}
        sorts = {kind for name, kind in kinds.items() if kind != "numpy" or name not in self._host_inputs}
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
        """Run on torch tensors; the outputs are on the device of the first input. Backends that compute on tensors have their own."""
        torch = sys.modules["torch"]
        device = feed[self._input_names[0]].device
        arrays = self._compute({name: np.asarray(x.numpy(force=True), order="C") for name, x in feed.items()})
        return [torch.from_numpy(writable(np.asarray(array))).to(device) for array in arrays]

    def _run_device(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Run on device arrays of other libraries. Called only if `device_arrays` is set."""
        raise NotImplementedError

    def _run_into(self, feed: Mapping[str, Any], sort: Sort, out: Mapping[str, Any]) -> dict[str, Any]:
        """Run on torch tensors or device arrays, and write to those of `out`. Called only if `device_arrays` is set."""
        raise NotImplementedError

    def _run_numpy_on_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Run on numpy arrays with a backend that computes on torch tensors."""
        return from_torch(self._compute({name: to_torch(x, self.device) for name, x in feed.items()}))

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
        """Sizes for the symbolic dimensions: those of the first profile's optimum, else of the preprocessed images.

        The batch is 1 if there is no profile. Raises UsageError for a symbolic dimension that neither gives a size.
        """
        remedy = "pass a feed of your own, or export with a number there"
        return default_dims(self.inputs, self.profiles, self._image, known={}, remedy=remedy)

    def run_async(self, feed: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """`run` in a thread of the session: at most `concurrency` at a time, in the order of the calls.

        The arrays of `feed` must not change until the future is done. Raises SessionClosedError after `close()`.
        """
        with self._state_lock:
            if self._closed:
                raise closed_error(self.name)
            if self._pool is None:
                self._pool = TaskPool(self.concurrency, f"deploy {self.name}")
            return self._pool.submit(self.run, feed)

    def stream(self, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The outputs of each feed, in order. A few feeds are taken ahead of the output that is read.

        If the backend can, it overlaps the copies and the computation of neighbouring feeds. An iterator that is
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
        """The time of each layer on a feed of numpy arrays, in the order in which they run. Measuring makes it slower than `run`.

        Raises BackendError if the backend cannot time its layers.
        """
        raise BackendError(f"{self.backend} does not report the time of its layers")

    def device_times(self, feed: Mapping[str, Any], runs: int = RUNS) -> DeviceTimes | None:
        """The times of the copies and of the run on the GPU, for numpy arrays; None if nothing is copied or it cannot be timed."""
        return None

    def close(self) -> None:
        """Release what the session holds. Runs under way finish; later ones raise SessionClosedError. May be called twice."""
        if not self._shut():
            return
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if not self._stale:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} on {self.device}: {', '.join(map(str, self.inputs))}>"


def first_line(error: Exception) -> str:
    """The first line of the message of a library's error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

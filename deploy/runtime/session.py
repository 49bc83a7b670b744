"""The session: one opened artifact, whatever runs it; and the table of backends.

A backend is a module of `deploy.runtime` with

    class BackendSession(Session)                                     what it opens
    def open_session(artifact: Artifact, options: SessionOptions) -> Session

Importing it raises BackendError, saying what is missing, where its library is not installed.
"""

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np

from deploy.artifact import Artifact, Manifest
from deploy.errors import BackendError, InputError, SessionClosedError, UsageError
from deploy.tensors import Profile, TensorSpec, default_dims, format_shape, random_feed

BACKENDS = ("onnxruntime", "openvino", "eager", "compile", "null")
"""Every backend, in the order in which they are listed and benchmarked."""

AUTO = ("onnxruntime", "openvino")
"""What `auto` tries, in this order. Never eager or compile: they run the model factory's code."""

_SEEN_SHAPES = 4096


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to open a session.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the GPU where the backend can use one.
    threads: threads of one run; None for the physical cores that the process may use. eager and compile set it for the
        process, and leave torch's own choice where it is None.
    compute: precision of the arithmetic of what the file holds in FP32. `fp32` means FP32; OpenVINO can be asked for
        `bf16` or `fp16`, which is faster and off by about 1e-2.
    """

    device: str = "auto"
    threads: int | None = None
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        name, _, index = self.device.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and not (name == "cuda" and index.isdecimal())):
            raise UsageError(f"unknown device {self.device!r}; expected auto, cpu, cuda or cuda:N")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be 1 or more, not {self.threads}")
        if self.compute not in ("fp32", "bf16", "fp16"):
            raise UsageError(f"unknown compute precision {self.compute!r}; expected fp32, bf16 or fp16")


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

    def __init__(self, artifact: Artifact, options: SessionOptions, *, device: str = "cpu") -> None:
        """Refuses what the backend cannot do. Raises BackendError, or ArtifactError naming a damaged file."""
        self._check_request(artifact, options)
        self.name = artifact.manifest.name
        self.device = device
        self._closed = False
        self._describe(artifact.manifest)

    def _check_request(self, artifact: Artifact, options: SessionOptions) -> None:
        refuse_engine(artifact)
        if options.device != "auto" and options.device.partition(":")[0] not in self.devices:
            raise BackendError(f"{self.backend} runs on {' or '.join(self.devices)} in this version, not on {options.device}")
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
        self._seen: dict[tuple[Any, ...], Literal["numpy", "torch"]] = {}  # feeds that passed the checks

    @abstractmethod
    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Run once: checked arrays of the `native` sort by name in, outputs in order out. Thread-safe."""

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
        try:
            if sort == "torch":
                results = self._run_torch(feed)
            elif self.native == "torch":
                results = self._run_numpy_on_torch(feed)
            else:
                for x in feed.values():
                    if not x.flags.c_contiguous:  # np.ascontiguousarray would make a scalar a vector
                        feed = {name: np.asarray(x, order="C") for name, x in feed.items()}
                        break
                results = self._compute(feed)
        except MemoryError as error:
            shapes = ", ".join(f"{name} {_shape(x)}" for name, x in feed.items())
            raise BackendError(f"{self.backend} has no memory to run {self.name!r} on {shapes}: {first_line(error)}") from error
        named = dict(zip(self._output_names, results, strict=True))
        return named if out is None else _write(named, out)

    def _check(self, feed: Mapping[str, Any]) -> Literal["numpy", "torch"]:
        """Check a feed in full and say what it is made of. Raises InputError."""
        if not isinstance(feed, Mapping):
            raise InputError(
                f"run() takes arrays by input name, not a {type(feed).__name__}; expected {', '.join(map(str, self.inputs))}"
            )
        self._check_names(feed)
        sorts = {_sort(name, x) for name, x in feed.items()}
        if len(sorts) > 1:
            raise InputError("the feed mixes numpy arrays and torch tensors; give all inputs as one of the two")
        dims: dict[str, int] = {}
        for spec in self.inputs:
            x = feed[spec.name]
            spec.check(str(x.dtype).removeprefix("torch."), tuple(x.shape), dims)
        sort = sorts.pop() if sorts else "numpy"
        if sort == "numpy" and any(spec.dtype == "bfloat16" for spec in self.outputs):
            raise InputError(f"{self.name!r} returns bfloat16, which numpy lacks; give torch tensors")
        return sort

    def _remember(self, key: tuple[Any, ...], sort: Literal["numpy", "torch"]) -> None:
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
            results = [torch.from_numpy(_writable(np.asarray(array))) for array in arrays]
        return [result.to(device) for result in results]

    def _run_numpy_on_torch(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Numpy arrays in and out of a backend that computes on torch tensors."""
        torch = sys.modules["torch"]  # imported by the backend
        results = self._compute({name: torch.from_numpy(_writable(x)).to(self.device) for name, x in feed.items()})
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

    def warmup(self, feed: Mapping[str, Any] | None = None, runs: int = 3) -> None:
        """Run a few times, on `feed` or on random arrays of the optimal shapes, so that the next run is not the first."""
        feed = random_feed(self.inputs, self.dims()) if feed is None else feed
        for _ in range(runs):
            self.run(feed)

    def close(self) -> None:
        """Release what the session holds. Runs under way finish; later ones raise SessionClosedError. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} on {self.device}: {', '.join(map(str, self.inputs))}>"


def _sort(name: str, x: Any) -> Literal["numpy", "torch"]:
    if isinstance(x, np.ndarray):
        return "numpy"
    if type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "detach"):
        return "torch"
    raise InputError(f"{name!r} is a {type(x).__name__}; expected a numpy array or a torch tensor")


def _writable(x: np.ndarray) -> np.ndarray:
    """`x` itself where torch may share its memory, else a copy (torch has no read-only tensors)."""
    return x if x.flags.writeable and x.flags.c_contiguous else x.copy()


def _write(results: dict[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """Copy results into the arrays of `out`, all or, when one does not fit, none; the results by name."""
    for name, target in out.items():
        if name not in results:
            raise InputError(f"unknown output {name!r} in out; expected one of {', '.join(results)}")
        result = results[name]
        if type(target) is not type(result) or target.shape != result.shape or target.dtype != result.dtype:
            found = " ".join(str(part) for part in (type(target).__name__, getattr(target, "dtype", ""), _shape(target)) if part)
            raise InputError(f"out[{name!r}] is {found}; expected {type(result).__name__} {result.dtype} {_shape(result)}")
        if isinstance(target, np.ndarray) and not target.flags.writeable:
            raise InputError(f"out[{name!r}] is read-only")
    for name, target in out.items():
        target[...] = results[name]
        results[name] = target
    return results


def _shape(x: Any) -> str:
    return format_shape(tuple(x.shape)) if hasattr(x, "shape") else ""


def closed_error(name: str) -> SessionClosedError:
    return SessionClosedError(f"the session on {name!r} is closed")


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def open_session(artifact: Artifact, backend: str = "auto", options: SessionOptions | None = None) -> Session:
    """Open `artifact` with a backend of `BACKENDS`, or with the first of `AUTO` that can run it here.

    Raises UsageError for an unknown backend, BackendError when it is not installed or cannot run the artifact, ArtifactError when a
    file of the artifact is damaged.
    """
    options = options or SessionOptions()
    if backend != "auto":
        return _module(backend).open_session(artifact, options)  # type: ignore[no-any-return]
    refuse_engine(artifact)
    reasons = []
    for name in AUTO:
        try:
            return _module(name).open_session(artifact, options)  # type: ignore[no-any-return]
        except BackendError as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend can run {artifact.location} here: " + "; ".join(reasons))


def _module(backend: str) -> Any:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    return importlib.import_module(f"deploy.runtime.{backend}")


def refuse_engine(artifact: Artifact) -> None:
    """Raise BackendError when `artifact` is an engine."""
    manifest = artifact.manifest
    if manifest.kind == "engine":
        flavour = manifest.target.flavour if manifest.target else "TensorRT"
        parent = f" ({os.path.normpath(artifact.path / manifest.parent.path)})" if manifest.parent else ""
        raise BackendError(
            f"{artifact.location} is a {flavour} engine: it runs on an NVIDIA GPU with the TensorRT runtime, which this version"
            f" does not have yet; run the ONNX artifact that it was built from{parent} instead"
        )

"""The session: one opened artifact, whatever runs it; and the table of backends.

A backend is a module of `deploy.runtime` with

    class BackendSession(Session)                                     what it opens
    def open_session(artifact: Artifact, options: SessionOptions) -> Session

Importing it raises BackendError, saying what is missing, where its library is not installed.
"""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np

from deploy.artifact import Artifact
from deploy.errors import BackendError, InputError, SessionClosedError, UsageError
from deploy.tensors import Profile, TensorSpec, format_shape, random_feed

BACKENDS = ("onnxruntime", "openvino", "eager", "compile", "null")
"""Every backend, in the order in which they are listed and benchmarked."""

AUTO = ("onnxruntime", "openvino")
"""What `auto` tries, in this order. Never eager or compile: they run the model factory's code."""

_SEEN_SHAPES = 4096


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to open a session.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the GPU where the backend can use one.
    threads: threads of one run, None for what the backend thinks best. eager and compile set it for the process.
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

    def __init__(self, artifact: Artifact, *, device: str = "cpu") -> None:
        manifest = artifact.manifest
        self.name = manifest.name
        self.device = device
        self.inputs: tuple[TensorSpec, ...] = tuple(manifest.inputs)
        self.outputs: tuple[TensorSpec, ...] = tuple(manifest.outputs)
        self.profiles: tuple[Profile, ...] = tuple(manifest.profiles)
        self._input_names = tuple(spec.name for spec in self.inputs)
        self._output_names = tuple(spec.name for spec in self.outputs)
        self._seen: set[Any] = set()
        self._closed = False

    @abstractmethod
    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Run once: checked arrays of the `native` sort by name in, outputs in order out. Thread-safe."""

    def _release(self) -> None:  # noqa: B027  (a backend with nothing to release need not say so)
        """Let go of what the backend holds. Called once; runs that have begun may still be under way."""

    def run(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run the model on one feed; the outputs by name.

        `out` maps output names to arrays or tensors that the results are written to; they are then what comes back.
        Raises InputError for names, dtypes or shapes other than `inputs` says, SessionClosedError after `close()`.
        """
        if self._closed:
            raise SessionClosedError(f"the session on {self.name!r} is closed")
        # The fast path: numpy arrays of shapes that were checked before. Everything else is checked in full.
        key = [len(feed)]
        try:
            for name in self._input_names:
                x = feed[name]
                if type(x) is not np.ndarray or not x.flags.c_contiguous:
                    break
                key += (x.dtype, x.shape)
            else:
                if self.native == "numpy" and tuple(key) in self._seen:
                    results = dict(zip(self._output_names, self._compute(feed), strict=True))
                    return results if out is None else _write(results, out)
        except KeyError:
            pass  # named by _run_checked
        return self._run_checked(feed, out)

    def _run_checked(self, feed: Mapping[str, Any], out: Mapping[str, Any] | None) -> dict[str, Any]:
        self._check_names(feed)
        sorts = {_sort(name, x) for name, x in feed.items()}
        if len(sorts) > 1:
            raise InputError("the feed mixes numpy arrays and torch tensors; give all inputs as one of the two")
        sort = sorts.pop()
        dims: dict[str, int] = {}
        for spec in self.inputs:
            x = feed[spec.name]
            spec.check(str(x.dtype).removeprefix("torch."), tuple(x.shape), dims)
        device = feed[self._input_names[0]].device if sort == "torch" else None
        if self.native == "torch":
            torch = importlib.import_module("torch")
            native = {n: torch.as_tensor(x if sort == "torch" else _writable(x), device=self.device) for n, x in feed.items()}
            results = list(self._compute(native))
            if sort == "numpy":
                results = [result.cpu().numpy() for result in results]
        else:
            native = {
                n: x.detach().cpu().contiguous().numpy() if sort == "torch" else np.ascontiguousarray(x) for n, x in feed.items()
            }
            results = list(self._compute(native))
            if sort == "torch":
                torch = sys.modules["torch"]
                results = [torch.from_numpy(_writable(np.asarray(result))) for result in results]
            else:
                if len(self._seen) >= _SEEN_SHAPES:
                    self._seen.clear()
                self._seen.add((len(feed), *(part for n in self._input_names for part in (feed[n].dtype, feed[n].shape))))
        if sort == "torch":
            results = [result.to(device) for result in results]
        named = dict(zip(self._output_names, results, strict=True))
        return named if out is None else _write(named, out)

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
        """Sizes for the symbolic dimensions: those of the first profile's optimum, and 1 for a lone symbolic batch.

        Raises UsageError when a symbolic dimension has no profile to take a size from.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str) and dim not in sizes:
                    if self.profiles:
                        sizes[dim] = self.profiles[0][spec.name].opt[axis]
                    elif axis == 0:
                        sizes[dim] = 1
                    else:
                        raise UsageError(f"{spec} has no profile that gives {dim!r} a size")
        return sizes

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


def _sort(name: str, x: Any) -> str:
    if isinstance(x, np.ndarray):
        return "numpy"
    if type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "detach"):
        return "torch"
    raise InputError(f"{name!r} is a {type(x).__name__}; expected a numpy array or a torch tensor")


def _writable(x: np.ndarray) -> np.ndarray:
    """`x` itself where torch may share its memory, else a copy (torch has no read-only tensors)."""
    return x if x.flags.writeable and x.flags.c_contiguous else x.copy()


def _write(results: dict[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """Copy results into the arrays of `out`; the results by name, with those of `out` in place."""
    for name, target in out.items():
        if name not in results:
            raise InputError(f"unknown output {name!r} in out; expected one of {', '.join(results)}")
        result = results[name]
        if type(target) is not type(result) or target.shape != result.shape or target.dtype != result.dtype:
            found = f"{type(target).__name__} {target.dtype} {format_shape(tuple(target.shape))}"
            raise InputError(
                f"out[{name!r}] is {found}; expected {type(result).__name__} {result.dtype} {format_shape(tuple(result.shape))}"
            )
        target[...] = result
        results[name] = target
    return results


def open_session(artifact: Artifact, backend: str = "auto", options: SessionOptions | None = None) -> Session:
    """Open `artifact` with a backend of `BACKENDS`, or with the first of `AUTO` that can run it here.

    Raises BackendError when the backend is unknown, not installed or cannot run the artifact, ArtifactError when a
    file of the artifact is damaged.
    """
    options = options or SessionOptions()
    if backend != "auto":
        return _module(backend).open_session(artifact, options)  # type: ignore[no-any-return]
    reasons = []
    for name in AUTO:
        try:
            return _module(name).open_session(artifact, options)  # type: ignore[no-any-return]
        except BackendError as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend can run {artifact.location} here: " + "; ".join(reasons))


def _module(backend: str) -> Any:
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; expected auto, fastest or one of {', '.join(BACKENDS)}")
    return importlib.import_module(f"deploy.runtime.{backend}")


def refuse_engine(artifact: Artifact, backend: str) -> None:
    """Raise BackendError when `artifact` is an engine, which `backend` cannot run."""
    if artifact.manifest.kind == "engine":
        target = artifact.manifest.target
        flavour = target.flavour if target else "TensorRT"
        raise BackendError(f"{artifact.location} is a {flavour} engine, which {backend} cannot run")

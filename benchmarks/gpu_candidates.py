"""What `gpu_report.py` compares: PyTorch on the same GPU in all its ways, and what `deploy` makes.

The sorts of candidates beside PyTorch (`kind`) are `aoti` (AOTInductor), `onnxruntime` (its CUDA provider), `tensorrt` and
`tensorrt-rtx`; any of them may be missing on a machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from gpu_setting import Setting, aoti_folder, engine_folder, opened, source

import deploy
from deploy.artifact.artifact import Artifact
from deploy.engine.flavour import load_flavour
from deploy.errors import BackendError
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import import_backend
from deploy.runtime.session import Session

FLAVOURS = ("tensorrt", "tensorrt-rtx")
KINDS = ("aoti", "onnxruntime", *FLAVOURS)
EXHAUSTIVE = ("resnet50",)
"""The models that torch.compile and AOTInductor tune as thoroughly as they can, and that are built in every precision."""

_FP16 = "fp16,channels_last"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One line of a table.

    backend: as `deploy.load` takes it. kind: `eager`, `compile` or one of KINDS. tf32: whether FP32 is computed in TF32.
    max_autotune: whether its package was built so.
    """

    label: str
    kind: str
    backend: str
    precision: str = "fp32"
    tf32: bool = False
    max_autotune: bool = False

    @property
    def tuned(self) -> bool:
        """Whether torch tunes its kernels for minutes."""
        return self.max_autotune or "max-autotune" in self.backend

    def jobs(self, model: str, batch: int) -> list[str]:
        """The names of the jobs (see `gpu_jobs`) that must have been done before it can be measured."""
        if self.kind == "compile":
            return [f"{'autotune' if self.tuned else 'compile'}/{model}/{batch}"]
        if self.kind == "aoti":
            return [f"aoti/{model}/{self.precision}{'/autotune' if self.max_autotune else ''}"]
        if self.kind in FLAVOURS:
            return [f"{self.kind}/{model}/{self.precision}"]
        return [f"fp16/{model}"] if self.kind == "onnxruntime" and self.precision == "fp16" else []

    def open(self, setting: Setting, model: str) -> Session:
        return opened(setting, self.artifact(setting, model), self.backend)

    def artifact(self, setting: Setting, model: str) -> Artifact:
        if self.kind == "onnxruntime":
            return source(setting, model, self.precision)
        if self.kind in ("eager", "compile") or setting.dry:
            return source(setting, model)
        if self.kind == "aoti":
            return deploy.open_artifact(aoti_folder(setting, model, self.precision, max_autotune=self.max_autotune))
        return deploy.open_artifact(engine_folder(setting, self.kind, model, self.precision))

    @contextmanager
    def around(self, setting: Setting) -> Iterator[None]:
        """While it runs: torch's permission for TF32 as this candidate wants it. Sessions turn it off when they open."""
        if setting.dry or not self.tf32:
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


EAGER = (
    Candidate(label="eager fp32", kind="eager", backend="eager"),
    Candidate(label="eager fp32, TF32", kind="eager", backend="eager", tf32=True),
    Candidate(label="eager fp16", kind="eager", backend=f"eager:{_FP16}", precision="fp16"),
    Candidate(label="eager fp16, CUDA graph", kind="eager", backend=f"eager:{_FP16},cuda_graph", precision="fp16"),
)
"""FP16 is in channels_last; cuDNN searches for its fastest convolutions in all of them."""

COMPILE = (
    Candidate(label="compile fp16", kind="compile", backend=f"compile:{_FP16}", precision="fp16"),
    Candidate(
        label="compile fp16, reduce-overhead", kind="compile", backend=f"compile:reduce-overhead,{_FP16}", precision="fp16"
    ),
    Candidate(label="compile fp16, max-autotune", kind="compile", backend=f"compile:max-autotune,{_FP16}", precision="fp16"),
)

AOTI = (
    Candidate(label="aoti fp16", kind="aoti", backend="aoti", precision="fp16"),
    Candidate(label="aoti fp16, CUDA graph", kind="aoti", backend="aoti:cuda_graph", precision="fp16"),
    Candidate(label="aoti fp32", kind="aoti", backend="aoti"),
    Candidate(label="aoti fp16, max-autotune", kind="aoti", backend="aoti", precision="fp16", max_autotune=True),
    Candidate(
        label="aoti fp16, max-autotune, CUDA graph", kind="aoti", backend="aoti:cuda_graph", precision="fp16", max_autotune=True
    ),
)

ONNXRUNTIME = (
    Candidate(label="onnxruntime:cuda fp32", kind="onnxruntime", backend="onnxruntime:cuda"),
    Candidate(label="onnxruntime:cuda fp16", kind="onnxruntime", backend="onnxruntime:cuda", precision="fp16"),
)


def engines(flavour: str, precisions: Sequence[str]) -> list[Candidate]:
    """The engines of one flavour: in every precision, and FP16 and INT8 with a CUDA graph too."""
    found = []
    for precision in precisions:
        found.append(Candidate(label=f"{flavour} {precision}", kind=flavour, backend=flavour, precision=precision))
        if precision != "fp32":
            label = f"{flavour} {precision}, CUDA graph"
            found.append(Candidate(label=label, kind=flavour, backend=f"{flavour}:cuda_graph", precision=precision))
    return found


def candidates(model: str, kinds: Sequence[str], *, autotune: bool) -> list[Candidate]:
    """The lines of a model's table, the most valuable first; those that take minutes to tune are the last.

    kinds: those of KINDS that are there. autotune: with those that torch tunes for minutes.
    """
    exhaustive = model in EXHAUSTIVE
    found = [*EAGER]
    for flavour in FLAVOURS:
        if flavour in kinds:
            found += engines(flavour, ("fp16", "int8", "fp32") if exhaustive else ("fp16", "int8"))
    ours = AOTI if "aoti" in kinds else ()
    found += [each for each in (*ours, *COMPILE) if not each.tuned]
    if "onnxruntime" in kinds:
        found += ONNXRUNTIME
    if exhaustive and autotune:
        found += [each for each in (*ours, *COMPILE) if each.tuned]
    return found


def lacking(setting: Setting) -> dict[str, str]:
    """Why each of KINDS that cannot be measured here cannot, by kind."""
    reasons = {}
    for kind in KINDS:
        if setting.kinds is not None and kind not in setting.kinds:
            reasons[kind] = "not asked for"
        elif not setting.dry and (reason := _lacking(kind)):
            reasons[kind] = reason
    return reasons


def _lacking(kind: str) -> str | None:
    try:
        if kind in FLAVOURS:
            load_flavour(kind)
        elif kind not in BACKENDS:
            return f"this version of deploy has no backend {kind}"
        else:
            import_backend(BACKENDS[kind]).version(("cuda",) if kind == "onnxruntime" else ())
    except BackendError as error:
        return str(error)
    return None

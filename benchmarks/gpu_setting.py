"""Where `gpu_report.py` measures, and the artifacts that it measures: made once, in folders that its processes share."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import random_feed
from deploy.precision.half.options import HalfPrecision
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

BATCHES = (1, 8, 32)
PROFILE_MAX = 128
"""The largest batch of an engine's second profile."""
CALIBRATION_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how long to measure.

    work: the folder of artifacts and caches. kinds: the sorts of candidates to measure beside PyTorch, see `gpu_candidates`;
    None for all. autotune: with torch's max-autotune. dry: in small, on the CPU, with eager and ONNX Runtime in the place of what needs a GPU: it tests the script.
    """

    work: Path
    kinds: frozenset[str] | None = None
    autotune: bool = True
    dry: bool = False
    batches: tuple[int, ...] = BATCHES
    rounds: int = 9
    slice_s: float = 0.05
    throughput_s: float = 0.5

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own, as programs have: the default stream waits for all others."""
        if self.dry:
            yield
        else:
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                yield

    def wait(self) -> None:
        """Wait for the current stream."""
        if not self.dry:
            torch.cuda.current_stream().synchronize()


def make_source(setting: Setting, model: str) -> None:
    """Export an architecture with random weights."""
    if model == "vit_b_16":
        deploy.export(setting.work / model, arch="torchvision:vit_b_16", weights=_vit_weights(setting.work))
    else:
        deploy.export(setting.work / model, arch=model)


def make_half(setting: Setting, model: str) -> None:
    """Convert what `make_source` made to FP16."""
    deploy.convert(source(setting, model), setting.work / f"{model}-fp16", precision="fp16")


def _vit_weights(work: Path) -> Path:
    """Random weights whose head is not all zeros, as torchvision's is: outputs that are all zero agree with anything."""
    from torchvision import models  # of this model alone

    torch.manual_seed(0)
    net = models.vit_b_16()
    torch.nn.init.normal_(net.heads.head.weight, std=0.02)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), work / "vit_b_16.pth")
    return work / "vit_b_16.pth"


def source(setting: Setting, model: str, precision: str = "fp32") -> Artifact:
    """What `make_source` made, in FP32, which eager and torch.compile run in any precision; or `make_half`, in FP16."""
    return deploy.open_artifact(setting.work / (model if precision == "fp32" else f"{model}-{precision}"))


def aoti_folder(setting: Setting, model: str, precision: str, *, max_autotune: bool) -> Path:
    return setting.work / f"{model}-{precision}{'-autotuned' if max_autotune else ''}-aoti"


def make_aoti(setting: Setting, model: str, precision: str, *, max_autotune: bool) -> None:
    """Build the AOTInductor package of a model."""
    out = aoti_folder(setting, model, precision, max_autotune=max_autotune)
    half: HalfPrecision | None = "fp16" if precision == "fp16" else None
    deploy.build_aoti(source(setting, model), out, precision=half, max_autotune=max_autotune, device=setting.device)


def engine_folder(setting: Setting, flavour: str, model: str, precision: str) -> Path:
    return setting.work / f"{model}-{precision}-{flavour}"


def make_engine(setting: Setting, flavour: str, model: str, precision: str) -> float | None:
    """Build an engine; the seconds that parsing and building took, None if it stood already.

    One profile for single images and one for batches. Calibrated on random input: for time, not for accuracy.
    """
    fp32 = source(setting, model)
    (spec,) = fp32.manifest.inputs
    rest = "x".join(str(dim) for dim in spec.shape[1:])
    shapes = [f"{spec.name}=1x{rest}", f"{spec.name}=2x{rest}:{PROFILE_MAX // 4}x{rest}:{PROFILE_MAX}x{rest}"]
    phases: list[tuple[str, float]] = []
    calibration = [random_feed([spec], {"batch": 8}, seed=seed) for seed in range(CALIBRATION_ROWS // 8)]
    deploy.build_trt(
        fp32,
        engine_folder(setting, flavour, model, precision),
        precision=None if precision == "fp32" else "fp16",
        int8=precision == "int8",
        calib=calibration if precision == "int8" else None,
        allow_slower=precision == "int8",
        flavour=flavour,
        shapes=shapes,
        cache=False,
        progress=lambda phase, *_: phases.append((phase, time.perf_counter())),
    )
    if not phases:
        return None
    start = next(at for phase, at in phases if phase == "parsing")
    end = next((at for phase, at in phases if phase == "attesting the engine"), phases[-1][1])
    return end - start


def opened(setting: Setting, artifact: Artifact, backend: str, contexts: int | None = None) -> Session:
    """A session on the GPU. In a dry run, eager in place of torch's backends, and ONNX Runtime on the CPU in place of others."""
    if setting.dry:
        stand_in = "eager" if backend.startswith(("eager", "compile", "aoti")) else "onnxruntime"
        return open_session(artifact, stand_in, SessionOptions(threads=1))
    return open_session(artifact, backend, SessionOptions(device=setting.device, contexts=contexts))

"""The manifest of an artifact: what it is, where it comes from, its files with their hashes, and the evidence about it.

The hashes reveal damage and accidental edits, but not malice: whoever can write the directory can also write matching
hashes, and an engine file is executable code.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import msgspec

from deploy.artifact.decode import Decode
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import Profile, TensorSpec
from deploy.artifact.tuning import Tuning
from deploy.artifact.usercode import UserFunction
from deploy.evidence.parity import Parity

FORMAT = 1
MANIFEST = "manifest.json"
ONNX = "model.onnx"
CPU_ONNX = "model.cpu.onnx"
"""The form of an INT8 graph that ONNX Runtime runs on processors with VNNI; in artifacts made by `quantize` alone."""
DATA = ".data"
"""What is added to the name of an ONNX file for the file beside it with its large weights."""
WEIGHTS = "weights.safetensors"
ENGINE = "engine.plan"
PACKAGE = "model.pt2"
RUNTIME_CACHE = "runtime.cache"
"""The kernels that tensorrt-rtx compiled at run time, beside an engine. No manifest lists the file: it can be made again."""

Kind = Literal["onnx", "engine", "package"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "fp64"]
QUANTIZED: tuple[Precision, ...] = ("int8", "fp8")
"""The precisions that calibration decides on: pairs of QuantizeLinear and DequantizeLinear around the layers."""
FlavourName = Literal["tensorrt", "tensorrt-rtx"]

FLAVOURS: tuple[FlavourName, ...] = get_args(FlavourName)
"""The flavours of TensorRT, each of which builds and runs engines of its own."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size in bytes and the SHA-256, in hexadecimal, of one file of the payload."""

    bytes: int
    sha256: str


class SourceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the user's Python files that the model was built from: its absolute path and SHA-256."""

    path: str
    sha256: str


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The origin of the weights and the computation; the same in all descendants of one export.

    factory: `lenet5`, `torchvision:resnet18`, `/path/net.py:Net`, `pkg.mod:Net`; None for a bare ONNX file.
    args: the factory's keyword arguments.
    files: the user's files that were imported to build the module, the factory's file first.
    folder: the current folder at the export, from which the user's modules were importable; None if not needed.
    weights: the name of the checkpoint file; None if the weights are random or are those of an ONNX file.
    state_dict: the SHA-256 of the weights, the same in all descendants (for a bare ONNX file, of the whole file).
    random: the weights were never trained.
    """

    factory: str | None
    args: dict[str, Any]
    files: list[SourceFile]
    weights: str | None
    state_dict: str
    random: bool
    folder: str | None = None


class Parent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The artifact from which this one was made: its path, relative to this artifact's directory, and its digest."""

    path: str
    digest: str


class Exclusion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that a precision pass left in FP32, and the reason."""

    node: str
    reason: str


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stage that made the artifact, and the digest of all its inputs and options."""

    name: str
    request: str


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TensorRT flavour that built an engine, and the GPUs that it runs on.

    gpu, compute_capability and driver are those of the machine it was built on; `targets` the compute capabilities that an
    engine built without a GPU is for. A version_compatible engine runs on later versions too, a hardware_compatible one on
    every GPU from compute capability 8.0 on. A stripped one has no weights: it gets those of the ONNX file beside it when it is
    loaded. opt_level, tf32 and workspace: see `engine.builder.BuildOptions`.
    """

    flavour: FlavourName
    version: str
    gpu: str | None
    compute_capability: str | None
    targets: list[str]
    driver: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    stripped: bool = False
    opt_level: int | None = None
    tf32: bool = False
    workspace: int | None = None


class PackageTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The torch that compiled an AOTInductor package, and the machine that it runs on. It runs on no other.

    device: what it computes on. machine: `x86_64`, as `platform.machine()` says. instruction_sets: of the processor that it was
    compiled on and for, GPU package or not. gpu, compute_capability: None for the CPU. max_autotune: kernels were chosen by timing.
    """

    torch: str
    device: Literal["cpu", "cuda"]
    machine: str
    instruction_sets: list[str]
    gpu: str | None = None
    compute_capability: str | None = None
    max_autotune: bool = False


COMPUTE_PRECISIONS = ("int8", "fp8", "fp16", "bf16", "tf32", "fp32")
"""What multiply-accumulates may be computed in, as in `PrecisionShare`."""


class PrecisionShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Share of the multiply-accumulates of Conv, Gemm and MatMul in each precision, 0 to 1.

    `origin` (`from` in the file): read from the built `engine`, which is then attested, or from the typed `network` that the
    parser made. The shares are those of what can be counted; `unknown` is the number of nodes that cannot (an LSTM, a matrix
    product inside a Loop). Of an engine that a GPU has loaded, there are `layers` and `time`, the shares of all its layers by
    their number and by the GPU time of a run; `coverage`, the share of the multiply-accumulates whose precision the inspector
    tells; and `fp16_sums`, the share of those that are known to be added up in FP16 (others may be: not every name tells).
    """

    int8: float
    fp16: float
    bf16: float
    fp32: float
    fp8: float = 0.0
    tf32: float = 0.0
    origin: Literal["engine", "network"] = msgspec.field(name="from")
    layers: dict[str, float] | None = None
    time: dict[str, float] | None = None
    unknown: int = 0
    coverage: float | None = None
    fp16_sums: float | None = None


class LayerNoise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Signal-to-quantization-noise ratio, in dB, of one node's output on FP32 inputs; None for no noise at all."""

    node: str
    sqnr_db: float | None


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the scales of an INT8 or FP8 artifact were determined.

    data: the SHA-256 of the calibration data; None for feeds that can be read only once.
    rows: the number of images, or of rows of feeds. skipped: files that could not be read.
    equalized: the ranges were equalized across layers before.
    smoothed: activations whose channels were evened out before, by name.
    floats: the precision of everything that is not quantized.
    layers: the noise of every node that is quantized, alone, the noisiest first; what was too noisy is among the exclusions instead.
    share: what is quantized of the multiply-accumulates of layers with weights, 0 to 1; None where they cannot be counted.
    """

    data: str | None
    kind: Literal["images", "npz", "feeds"]
    rows: int
    skipped: list[str]
    method: str
    per_tensor: bool
    bias_correction: bool
    equalized: bool
    floats: Literal["fp32", "fp16"]
    layers: list[LayerNoise]
    smoothed: list[str] = []
    share: float | None = None


class CpuEvidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The evidence about `CPU_ONNX`: its parity with the FP32 artifact, or why the file is not there."""

    parity: Parity | None = None
    left_out: str | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a metric makes of an artifact on some data, in the metric's own unit, and what was lost of its parent's.

    metric: as it was asked for, such as `miou`, `map` or `metrics.py:dice`. unit: `%`, `dB` or none.
    lower: less is better. low, high: the 95 % interval; None where there is none.
    loss: how much worse than the parent, negative where better; None without a parent, and for what is measured against it.
    limit: of a gate: the most that may be lost, or for sqnr and cosine the least that must be reached.
    """

    metric: str
    value: float
    unit: str = ""
    lower: bool = False
    low: float | None = None
    high: float | None = None
    parent: float | None = None
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    limit: float | None = None


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accuracy on labelled images, and that of the FP32 artifact it was made from on the same ones.

    backend, file: what was measured: the backend, and the ONNX file that it ran where an artifact has several.
    top1, top5: in per cent; None where another metric was asked for, whose figures are in `score`; `judged` has either.
    top1_low, top1_high: the 95 % interval of top-1: see `evaluation.intervals.wilson`.
    expected_top1: of an export, what training reported, where that was given.
    parent_..., top1_drop: None for an export, which has no parent.
    top1_drop: points of top-1 accuracy lost, with its 95 % interval: see `evaluation.intervals.paired_drop`.
    max_drop: of a gate, the points of top-1 that may be lost.
    undecided: how many more images would decide whether the limit is kept, where its 95 % interval does not; -1: no number would.
    """

    images: int
    top1: float | None = None
    top5: float | None = None
    backend: str
    file: str | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    expected_top1: float | None = None
    parent_top1: float | None = None
    parent_top5: float | None = None
    top1_drop: float | None = None
    top1_drop_low: float | None = None
    top1_drop_high: float | None = None
    max_drop: float | None = None
    undecided: int | None = None
    score: Score | None = None

    @property
    def judged(self) -> Score:
        """The score that was asked for: top-1 where that is `top1`."""
        if self.score is not None:
            return self.score
        assert self.top1 is not None
        return Score(
            metric="top1",
            value=self.top1,
            unit="%",
            low=self.top1_low,
            high=self.top1_high,
            parent=self.parent_top1,
            loss=self.top1_drop,
            loss_low=self.top1_drop_low,
            loss_high=self.top1_drop_high,
            limit=self.max_drop,
        )


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that an artifact records about itself. `digest` is the SHA-256 of everything but itself and `created`.

    preprocess: how an image becomes the input `image`, which is None where there is one input alone.
    other_images: how images become further inputs, by name. decode: how a detector's outputs become boxes.
    parity: of the ONNX file with the parent's, or of a package with the eager module. engine_parity: of an engine with its typed ONNX file, if a GPU has run it.
    accuracy: the worst where several backends were judged; all are in `accuracies` then.
    cpu_form: of an INT8 artifact for which it was asked. tuning: of an artifact that `tune` made.
    """

    format: int
    kind: Kind
    name: str
    precision: Precision
    source: Source
    parent: Parent | None
    files: dict[str, FileRecord]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    profiles: list[Profile]
    preprocess: Preprocess | None
    classes: list[str] | None
    parity: Parity | None
    accuracy: Accuracy | None
    calibration: Calibration | None
    exclusions: list[Exclusion]
    tools: dict[str, str]
    stage: Stage
    created: str
    target: Target | None = None
    package: PackageTarget | None = None
    precision_share: PrecisionShare | None = None
    engine_parity: Parity | None = None
    image: str | None = None
    other_images: dict[str, Preprocess] = {}
    accuracies: list[Accuracy] = []
    cpu_form: CpuEvidence | None = None
    decode: Decode | None = None
    tuning: Tuning | None = None
    digest: str = ""

    @property
    def functions(self) -> list[UserFunction]:
        """The functions of the user's that go with the artifact: a file of each is among `files`, or it is imported."""
        steps = [self.preprocess, *self.other_images.values(), self.decode]
        return [step.function for step in steps if step is not None and step.function is not None]

    def sealed(self) -> Self:
        """A copy with the right `digest`."""
        return msgspec.structs.replace(self, digest=content_digest(msgspec.to_builtins(self)))

    def to_json(self) -> str:
        """JSON in UTF-8; paths that are not UTF-8 stand in it as Python reads them back, with `\\udc80` to `\\udcff` for bytes."""
        return _escaped(json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False)).decode() + "\n"


def content_digest(manifest: Mapping[str, Any]) -> str:
    """The digest of a manifest in its JSON form."""
    return request_digest({**manifest, "digest": "", "created": ""})


def request_digest(value: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON-like value in canonical form: keys sorted, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(_escaped(text)).hexdigest()


def _escaped(text: str) -> bytes:
    """`text`, which is JSON, in UTF-8: what UTF-8 does not have becomes an escape of JSON's, which looks as Python's does."""
    return text.encode("utf-8", "backslashreplace")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

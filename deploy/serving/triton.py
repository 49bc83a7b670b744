"""Export of artifacts to a model repository of Triton Inference Server, with a KServe manifest that serves it.

The formats: Triton's "Model Repository" and "Model Configuration", KServe's `serving.kserve.io/v1beta1` InferenceService.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.manifest import ENGINE
from deploy.artifact.onnxfile import external_files, load_graph
from deploy.artifact.tensors import TensorSpec, batch_dim, default_dims, rows_join
from deploy.errors import BackendError, OutputError, UsageError
from deploy.serving.request import DATATYPES
from deploy.serving.source import ModelSource

KSERVE = "inferenceservice.yaml"
LABELS = "labels.txt"

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How Triton runs the models.

    instances: of every model. cpu: run ONNX models on the processor; engines need a GPU. max_batch: the most rows of a batch; None is
    the largest batch of the profile, or 32 without one. delay_us: how long a batch waits for more rows, in microseconds.
    keep_versions: how many of the newest versions are served. storage_uri: where KServe finds the repository.
    """

    instances: int = 1
    cpu: bool = False
    max_batch: int | None = None
    delay_us: int = 100
    keep_versions: int = 1
    storage_uri: str = "pvc://models/triton"

    def __post_init__(self) -> None:
        for name in ("instances", "keep_versions"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be 1 or more, not {getattr(self, name)}")
        if self.max_batch is not None and self.max_batch < 1:
            raise UsageError(f"`max_batch` must be 1 or more, not {self.max_batch}")
        if self.delay_us < 0:
            raise UsageError(f"`delay_us` must be 0 or more, not {self.delay_us}")


def export_triton(sources: Sequence[ModelSource], repository: Path, options: TritonOptions | None = None) -> list[Path]:
    """Add models to `repository`, and write a manifest for KServe; returns the folders of the new versions.

    Nothing is written unless all models can be exported. Raises BackendError for an artifact that Triton cannot run, ArtifactError
    for a damaged one, and OutputError if the version exists.
    """
    options = options or TritonOptions()
    if not sources:
        raise UsageError("no artifact to export")
    planned: list[tuple[ModelSource, Artifact, str]] = []
    for source in sources:
        artifact = open_artifact(source.path)
        artifact.verify(weights=False)
        _check_runnable(artifact, options)
        if any((other.name, other.version) == (source.name, source.version) for other, _, _ in planned):
            raise UsageError(f"{source.name} version {source.version} is named twice: NAME=PATH@VERSION tells them apart")
        folder = repository / source.name / source.version
        if folder.exists():
            raise OutputError(f"{folder} exists already: give the model another version, NAME=PATH@VERSION")
        planned.append((source, artifact, config_pbtxt(source.name, artifact, options)))
    written = []
    for source, artifact, config in planned:
        model = repository / source.name
        model.mkdir(parents=True, exist_ok=True)
        if artifact.manifest.classes:
            _write(model / LABELS, "".join(f"{name}\n" for name in artifact.manifest.classes))
        written.append(_write_version(artifact, model / source.version))
        _write(model / "config.pbtxt", config)  # last, because Triton looks for it
    _write(repository / KSERVE, kserve_manifest(repository, options))
    return written


def config_pbtxt(name: str, artifact: Artifact, options: TritonOptions) -> str:
    """Triton's model configuration, in the text format of protocol buffers."""
    manifest = artifact.manifest
    engine = manifest.target is not None
    batch = batch_dim(manifest.inputs)
    batched = rows_join(manifest.inputs, manifest.outputs)
    first = manifest.inputs[0].name
    allowed = max((profile[first].max[0] for profile in manifest.profiles), default=None) if batched else None
    most = min(options.max_batch or allowed or 32, allowed or 1 << 30) if batched else 0
    best = min(manifest.profiles[0][first].opt[0] if manifest.profiles else most, most)

    def tensors(kind: str, listed: Iterable[TensorSpec]) -> list[str]:
        entries = []
        for spec in listed:
            dims = spec.shape[1:] if batched else spec.shape
            sizes = ", ".join("-1" if isinstance(dim, str) else str(dim) for dim in dims) or "1"
            shape = "" if dims else " reshape { shape: [] }"
            label = f' label_filename: "{LABELS}"' if kind == "output" and manifest.classes and len(dims) == 1 else ""
            entries.append(
                f"  {{ name: {_quoted(spec.name)} data_type: TYPE_{DATATYPES[spec.dtype]} dims: [{sizes}]{shape}{label} }}"
            )
        return [f"{kind} [", ",\n".join(entries), "]"]

    kind = "KIND_GPU" if engine else "KIND_CPU" if options.cpu else "KIND_AUTO"
    profiles = ""
    if engine and len(manifest.profiles) > 1:
        profiles = " profile: [" + ", ".join(f'"{index}"' for index in range(len(manifest.profiles))) + "]"
    lines = [
        f"# {artifact.shown}: {manifest.precision}, manifest {manifest.digest[:12]}",
        f"name: {_quoted(name)}",
        f'platform: "{"tensorrt_plan" if engine else "onnxruntime_onnx"}"',
        f"max_batch_size: {most}",
        *tensors("input", manifest.inputs),
        *tensors("output", manifest.outputs),
        f"instance_group [ {{ kind: {kind} count: {options.instances}{profiles} }} ]",
        f"version_policy {{ latest {{ num_versions: {options.keep_versions} }} }}",
    ]
    if batched:
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [{best}] max_queue_delay_microseconds: {options.delay_us} preserve_ordering: false }}"
        )
    lines += _warmups(artifact, batched, batch, sorted({1, best, most}) if batched else [0])
    return "\n".join(lines) + "\n"


def _warmups(artifact: Artifact, batched: bool, batch: str | None, sizes: Sequence[int]) -> list[str]:
    """The lines for a warm-up run of every batch size in `sizes`; none if a dimension is not known."""
    manifest = artifact.manifest
    image = manifest.preprocess.shape if manifest.preprocess else None
    try:
        dims = default_dims(manifest.inputs, manifest.profiles, image, known={}, remedy="")
    except UsageError:
        return []
    entries = []
    for size in sizes:
        inputs = []
        for spec in manifest.inputs:
            shape = spec.concrete({**dims, **({batch: size} if batched and batch else {})})
            listed = ", ".join(map(str, shape[1:] if batched else shape)) or "1"
            filled = "random_data: true" if spec.dtype.startswith(("float", "bfloat")) else "zero_data: true"
            inputs.append(
                f"    inputs {{ key: {_quoted(spec.name)} value {{ data_type: TYPE_{DATATYPES[spec.dtype]} dims: [{listed}] {filled} }} }}"
            )
        rows = f" batch_size: {size}" if batched else ""
        entries.append("\n".join([f'  {{ name: "rows {size or "as they are"}"{rows}', *inputs, "  }"]))
    return ["model_warmup [", ",\n".join(entries), "]"]


def kserve_manifest(repository: Path, options: TritonOptions) -> str:
    """An InferenceService, in YAML, with which KServe runs Triton on the repository at `storage_uri`."""
    name = re.sub(r"[^a-z0-9-]+", "-", repository.resolve().name.lower()).strip("-")[:63].strip("-")
    if not _DNS_LABEL.fullmatch(name):
        name = "models"
    resources = "" if options.cpu else "      resources:\n        limits:\n          nvidia.com/gpu: 1\n"
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
        version: "2"
      protocolVersion: v2
      runtime: kserve-tritonserver
      storageUri: {json.dumps(options.storage_uri)}
{resources}"""


def _check_runnable(artifact: Artifact, options: TritonOptions) -> None:
    if artifact.manifest.kind == "package":
        raise BackendError(
            f"{artifact.shown} is an AOTInductor package, which this version cannot write for Triton: it runs on the very torch that"
            " compiled it, and Triton's PyTorch backend brings its own; serve it with `deploy serve`, or export the ONNX artifact"
        )
    target = artifact.manifest.target
    if target is None:
        return
    if target.flavour != "tensorrt":
        raise BackendError(
            f"{artifact.shown} is a {target.flavour} engine, which Triton cannot run: its TensorRT backend loads plans of TensorRT itself;"
            " build one with `deploy build-trt --flavour tensorrt`, or export the ONNX artifact"
        )
    if target.stripped:
        raise BackendError(
            f"{artifact.shown} has no weights in its engine file, and Triton puts none in: build one without `strip`, or export the"
            " ONNX artifact"
        )
    if options.cpu:
        raise UsageError(f"{artifact.shown} is an engine, which runs on a GPU: leave out `cpu`")


def _write_version(artifact: Artifact, folder: Path) -> Path:
    """Copy the payload to the new `folder`, which appears only when it is complete."""
    engine = artifact.manifest.target is not None
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        whole = Path(temporary) / "version"
        whole.mkdir()
        try:
            if engine:
                shutil.copyfile(artifact.path / ENGINE, whole / "model.plan")
            else:
                shutil.copyfile(artifact.onnx_path, whole / "model.onnx")
                for name in external_files(
                    load_graph(artifact.onnx_path).graph
                ):  # large weights, under the name it knows them by
                    shutil.copyfile(artifact.onnx_path.parent / name, whole / name)
            os.rename(whole, folder)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)

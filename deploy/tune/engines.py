"""Mixes that run as engines of TensorRT: INT8 or FP8, and FP16."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, Manifest, Stage
from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import Feed, Profile, batch_range, row_count
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import first_rows
from deploy.engine.builder import BuiltEngine, build_engine, checked
from deploy.engine.compatibility import rtx_refusal
from deploy.engine.flavour import Flavour, load_flavour
from deploy.engine.network import parse_network
from deploy.engine.options import BuildOptions
from deploy.errors import BackendError, UsageError
from deploy.evidence.parity import TOLERANCES
from deploy.pipeline.attest import attested, write_engine
from deploy.pipeline.build_trt import gpu_identity
from deploy.pipeline.profiles import make_profiles
from deploy.pipeline.stage import check_engine_source, descendant
from deploy.pipeline.typed import Typed, typed_graph, typed_quantized
from deploy.precision.formats import ConvertOptions
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.quantize import CalibratedGraph
from deploy.progress import Progress
from deploy.runtime.catalog import split_backend
from deploy.runtime.session import SessionOptions
from deploy.tune.damage import Kind, damage
from deploy.tune.measure import AT_A_TIME, ROWS, STAYS, Place, outputs

_STAGE = Stage(name="tune", request="")
_ON_CPU = "onnxruntime"
"""Where the network in floating point is run, and what one unit does: as the gate of `build-trt` runs typed files."""


@dataclass(frozen=True, kw_only=True)
class EngineSetting:
    """What engines are built with. gpu: its name, compute capability and driver."""

    flavour: Flavour
    profiles: list[Profile]
    options: BuildOptions
    gpu: list[str]

    @classmethod
    def of(cls, source: Artifact, backend: str, device: str, shapes: Sequence[str], *, fp8: bool) -> "EngineSetting":
        """Raises UsageError where no engine can be built from `source` with these shapes, BackendError where none can run here."""
        check_engine_source(source)
        if device not in ("auto", "cuda", "cuda:0"):
            raise UsageError(
                f"engines are built and timed on cuda:0, not on {device}: CUDA_VISIBLE_DEVICES says which GPU that is"
            )
        flavour = load_flavour(split_backend(backend)[0].name)
        profiles = make_profiles(shapes, source.manifest.inputs, source.manifest.profiles)
        gpu = gpu_identity()
        if gpu is None:
            raise BackendError(f"mixes are timed where they run, and there is no NVIDIA GPU here that {backend} could run on")
        if flavour.name == "tensorrt-rtx" and (refusal := rtx_refusal(gpu[0], gpu[1])):
            raise BackendError(refusal)
        return cls(flavour=flavour, profiles=profiles, options=checked(flavour, BuildOptions(), fp8=fp8), gpu=gpu)

    def rows_at_a_time(self, source: Artifact, wanted: int) -> int:
        """The rows that damage is measured on at a time: the nearest to `wanted` that the first profile takes."""
        found = batch_range(source.manifest.inputs, self.profiles[0])
        return wanted if found is None else min(max(wanted, found[0]), found[1])

    def feeds(self, source: Artifact, data: CalibrationSet, wanted: int) -> list[Feed]:
        """The rows that damage is measured on. Raises UsageError where there are fewer than the least batch of the engines."""
        size = self.rows_at_a_time(source, wanted)
        feeds = first_rows(data, size, max(ROWS, size))
        if (found := batch_range(source.manifest.inputs, self.profiles[0])) is not None:
            feeds = [feed for feed in feeds if row_count(feed) >= found[0]]
        if not feeds:
            raise UsageError(f"the engines take batches of {size} and more: give as many rows to calibrate on, of one size")
        return feeds


class EngineMixes:
    """Mixes of the network of `source`, in folders in `folder`; see `Mixes`. Each is built with the default options of `build-trt`.

    feeds: what damage is measured on, within the profiles. The damage of one unit is that of its codes alone, on the CPU: to build an
    engine for each would take hours.
    """

    def __init__(
        self,
        source: Artifact,
        data: CalibrationSet,
        graph: CalibratedGraph,
        place: Place,
        feeds: Sequence[Feed],
        kind: Kind,
        folder: Path,
        progress: Progress,
        setting: EngineSetting,
    ) -> None:
        self.graph = graph
        self.place = place
        self._source, self._data, self._setting, self._progress = source, data, setting, progress
        self._feeds = feeds
        self._kind: Kind = kind
        self._folder = folder
        self._typed: dict[Path, Typed] = {}
        self.at_a_time = AT_A_TIME  # on the CPU
        self._building = Lock()
        # What FP16 beside codes keeps in floating point, and codes alone would not.
        self._plain = dataclasses.replace(graph, options=dataclasses.replace(graph.options, fp16=False))
        whole = self._plain.placement(self._profile)
        self._kept = tuple(set(_quantized(whole)) - set(_quantized(self.placement())))
        self._expected = outputs(source, _ON_CPU, SessionOptions(), feeds)
        half = ConvertOptions(precision="fp16", profile=self._profile)
        typed = typed_graph(source, data, quantize=None, convert=half, profile=self._profile, progress=progress)
        self.base = self.proved(self._built("fp16", typed), ())

    @property
    def _profile(self) -> Profile:
        return self._setting.profiles[0]

    def placement(self) -> Placement:
        return self.graph.placement(self._profile)

    def build(self, name: str, stay: Sequence[str]) -> Artifact:
        quantized = self.graph.quantized(stay=dict.fromkeys(stay, STAYS), cpu=False, engine=self._profile)
        return self._built(name, typed_quantized(self._source, self._data, quantized, self.graph.options))

    def _built(self, name: str, typed: Typed) -> Artifact:
        setting = self._setting
        with ArtifactWriter(self._folder / name) as writer:
            for function in self._source.manifest.functions:
                function.copy(self._source.path, writer.path)
            typed = typed.saved(writer.path / ONNX)
            file, shown = writer.path / ONNX, self._source.shown
            built = build_engine(setting.flavour, file, setting.profiles, setting.options, self._progress, shown=shown)
            manifest = write_engine(writer, typed.manifest, self._source, built, setting.profiles, setting.flavour, _STAGE)
            artifact = writer.commit(manifest)
        self._typed[artifact.path] = typed
        return artifact

    def damage(self, mix: Artifact) -> float:
        return damage(self._expected, outputs(mix, self.place.backend, self.place.options, self._feeds), self._kind)

    def damage_alone(self, name: str, stay: Sequence[str]) -> float:
        left = dict.fromkeys((*stay, *self._kept), STAYS)
        with self._building, ArtifactWriter(self._folder / name) as writer:
            quantized = self._plain.quantized(stay=left, cpu=False, engine=self._profile)
            for function in self._source.manifest.functions:
                function.copy(self._source.path, writer.path)
            save_model(quantized.model, writer.path / ONNX)
            changes = {"precision": self.place.codes, "parity": None, "exclusions": quantized.exclusions}
            alone = writer.commit(descendant(self._source, writer.out, _STAGE, calibration=quantized.calibration, **changes))
        found = damage(self._expected, outputs(alone, _ON_CPU, SessionOptions(), self._feeds), self._kind)
        shutil.rmtree(alone.path)
        return found

    def proved(self, mix: Artifact, stay: Sequence[str]) -> Artifact:
        """A mix with its evidence, that of `build-trt`: the typed file compared with the source, and what the GPU says of the very engine that was timed.

        Another engine would have other kernels. Raises ParityError, EngineError and BackendError.
        """
        setting, typed = self._setting, self._typed[mix.path]
        tolerance = TOLERANCES[typed.manifest.precision]
        files = {name: record for name, record in mix.manifest.files.items() if name != ENGINE}
        parity = typed.proven(Artifact(mix.path, msgspec.structs.replace(typed.manifest, files=files)), tolerance, self._progress)
        engine = Artifact(mix.path, msgspec.structs.replace(mix.manifest, parity=parity))
        assert mix.manifest.target is not None
        network = parse_network(setting.flavour, mix.onnx_path, shown=self._source.shown)
        built = BuiltEngine(plan=b"", network=network, target=mix.manifest.target)
        manifest: Manifest = attested(
            engine,
            self._source,
            built,
            setting.flavour,
            setting.options,
            gpu=setting.gpu,
            faster_than_fp16=False,  # which it was timed to be
            tolerance=tolerance,
            progress=self._progress,
        )
        return Artifact(mix.path, manifest)


def _quantized(placement: Placement) -> Iterator[str]:
    """The nodes that read codes."""
    yield from placement.nodes
    for uses in placement.edges.values():
        yield from (node for node, _ in uses)

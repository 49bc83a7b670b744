"""The stage `build-aoti`: the module of an export, compiled ahead of time by AOTInductor, with the evidence that it computes the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import PACKAGE, Manifest, Stage
from deploy.artifact.tensors import Profile, random_feed
from deploy.artifact.writer import ArtifactWriter
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import NamedFeed, made_up_dims, parity_feeds, real_data
from deploy.engine.profile_choice import holds
from deploy.errors import DataError, ExportError, ParityError, UsageError
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import Parity, constant_outputs, tiny_outputs
from deploy.host.versions import tool_versions
from deploy.options import collect, option
from deploy.pipeline.profiles import make_profiles
from deploy.pipeline.stage import PathLike, check_fp32, default_out, descendant, open_source, run_stage
from deploy.precision.half.options import HalfPrecision
from deploy.progress import Progress, silent
from deploy.runtime.session import SessionOptions

if TYPE_CHECKING:
    from deploy.pipeline.written import Case


@dataclass(frozen=True, kw_only=True)
class BuildAotiOptions:
    """What to compile.

    precision: None is FP32. Inputs and outputs stay as they are.
    shapes: each a shape such as `1x3x224x224`, or three; what is left open is as in the manifest.
    """

    precision: HalfPrecision | None = option(None, switches={"fp16": "Compute in FP16.", "bf16": "Compute in bfloat16."})
    data: Path | None = option(None, "Real input for parity: an ImageFolder, or a folder of .npz feeds.", metavar="DIR")
    shapes: tuple[str, ...] = option(
        (),
        "Range of one input's shape, such as x=1x8:4x8:9x8; it is tuned for the middle one.",
        metavar="NAME=MIN:OPT:MAX",
    )
    max_autotune: bool = option(False, "Time several kernels for each operation and keep the fastest; takes minutes.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N: what to compile for, on this machine.", metavar="D")

    def __post_init__(self) -> None:
        SessionOptions(device=self.device)  # raises what is no device


def build_aoti(
    artifact: Artifact | PathLike,
    out: PathLike | None = None,
    *,
    precision: HalfPrecision | None = None,
    data: PathLike | None = None,
    shapes: Sequence[str] = (),
    max_autotune: bool = False,
    device: str = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    min_cosine: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Compile the module of an FP32 export with AOTInductor; `out` is `build/<name>[-<precision>]-aoti` by default.

    The module's factory runs, its files compared with the export's first; the package then runs without it, on this torch and this
    sort of processor or GPU alone. What the options mean: `BuildAotiOptions`. The limits of parity with the eager module in FP32:
    `deploy.evidence.parity.Tolerance`. Raises a DeployError; nothing that stood at `out` is lost then.
    """
    given = dict(locals())
    options = collect(BuildAotiOptions, given)
    limits = collect(ToleranceOptions, given)
    limits.tolerance("fp32")  # raises now what makes no sense
    source = open_source(artifact)
    suffixes = ([precision] if precision else []) + ["aoti"]
    return build_aoti_artifact(source, default_out(out, source, *suffixes), options, limits, progress)


def build_aoti_artifact(
    artifact: Artifact,
    out: Path,
    options: BuildAotiOptions,
    limits: ToleranceOptions | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write the package of the module that `artifact` was exported from to `out`, unless it is there already.

    Raises UsageError where `artifact` is no FP32 ONNX artifact, FactoryError where there is no module to rebuild, ExportError where it
    cannot be compiled, ParityError (the package is too far off; nothing is written), ArtifactError, DataError, BackendError
    (no compiler, no such device) and OutputError.
    """
    return run_stage(_BuildAoti(artifact, options, limits or ToleranceOptions(), progress), out, artifact)


class _BuildAoti:
    name = "build-aoti"

    def __init__(self, source: Artifact, options: BuildAotiOptions, limits: ToleranceOptions, progress: Progress) -> None:
        self._source = source
        self._options = options
        self._limits = limits
        self._progress = progress
        self._data: CalibrationSet | None = None

    def request(self) -> dict[str, Any]:
        from deploy.runtime.package import target_here  # these load torch
        from deploy.runtime.torch_device import device_named

        source, options = self._source, self._options
        check_fp32(source)
        self._profile = self._one_profile()
        self._data = real_data(source, options.data)
        self._device = device_named(options.device)
        self._target = target_here(self._device, max_autotune=options.max_autotune)
        return {
            "parent": source.manifest.digest,
            "precision": options.precision,
            "data": self._data.digest() if self._data else None,
            "profile": msgspec.to_builtins(self._profile),
            "target": msgspec.to_builtins(self._target),
            "limits": vars(self._limits),
            "tools": tool_versions(),
        }

    def _one_profile(self) -> Profile:
        manifest = self._source.manifest
        profiles = make_profiles(self._options.shapes, manifest.inputs, manifest.profiles)
        if len(profiles) > 1 and self._options.shapes:
            raise UsageError("a package has one range of shapes: name every input in `shapes` once")
        return profiles[0]

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        from deploy.intake.aoti import check_compiler
        from deploy.intake.build import rebuild
        from deploy.runtime.package import compile_here

        source, options, progress = self._source, self._options, self._progress
        check_compiler(self._device)
        progress("running the eager module")
        module = rebuild(source)
        cases = self._cases(module)
        manifest = descendant(
            source,
            writer.out,
            stage,
            kind="package",
            precision=options.precision or "fp32",
            profiles=[self._profile],
            parity=None,
            package=self._target,
        )
        progress("compiling")
        compile_here(module, manifest, writer.path / PACKAGE, device=self._device, max_autotune=options.max_autotune)
        del module
        parity = self._parity(writer.describe(manifest), cases)
        return msgspec.structs.replace(manifest, parity=parity)

    def _cases(self, module: Any) -> list["Case"]:
        """What the eager module makes, in FP32 on the CPU, of the feeds that are within the profile."""
        from deploy.pipeline.export_parity import finite, run_eager
        from deploy.pipeline.written import Case

        manifest = self._source.manifest
        files = [file.path for file in manifest.source.files]
        names = [spec.name for spec in manifest.outputs]
        cases: list[Case] = []
        for data, feed, maybe, _ in self._feeds():
            try:
                results = run_eager(module, manifest.inputs, feed, files)
            except ExportError:
                if maybe:
                    continue  # a size that nobody gave
                raise
            case = Case(data, feed, dict(zip(names, results.values(), strict=True)), maybe)
            if finite(case, fatal=not maybe):
                cases.append(case)
        return cases

    def _feeds(self) -> list[NamedFeed]:
        manifest, profile = self._source.manifest, self._profile
        feeds = [each for each in parity_feeds(self._source, self._data, profile) if holds(profile, _shapes(each.feed))]
        if self._data is None:
            best = {name: sides.opt for name, sides in profile.items()}
            dims = made_up_dims(manifest.inputs, profile)
            if all(_shapes(each.feed) != best for each in feeds):
                feeds.append(NamedFeed("random", random_feed(manifest.inputs, dims, seed=len(feeds) + 1)))
        if not feeds:
            raise DataError("no feed of `data` is within the range of `shapes`: give a wider range, or other data")
        return feeds

    def _parity(self, written: Artifact, cases: Sequence["Case"]) -> Parity:
        from deploy.pipeline.written import judged
        from deploy.runtime.load import open_session

        manifest = written.manifest
        tolerance = self._limits.tolerance(manifest.precision)
        self._progress("comparing the package with the eager module")
        by = f"aoti, torch {self._target.torch} on {self._target.gpu or 'the CPU'}"
        with open_session(written, "aoti", SessionOptions(device=self._device)) as session:
            found = judged(session.run, by, manifest.inputs, cases, tolerance, backend="aoti")
        if found.wrong is not None:
            raise ParityError(
                f"{manifest.name} in {manifest.precision.upper()} on {by}: {found.wrong}; nothing was written: looser limits are"
                " `rtol` and `atol`"
            )
        expected = [case.expected for case in cases]
        constant, tiny = constant_outputs(expected), tiny_outputs(expected, found.cases, tolerance)
        return Parity(against="eager", by=by, tolerance=tolerance, cases=found.cases, constant=constant, tiny=tiny)


def _shapes(feed: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in feed.items()}

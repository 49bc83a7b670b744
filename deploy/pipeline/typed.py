"""The typed ONNX graph that an engine is built from: the artifact's own, or one quantized or converted on the way."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.onnxfile import load_model, save_model
from deploy.artifact.tensors import Profile
from deploy.data.calibration_set import CalibrationSet
from deploy.data.evidence_feeds import NamedFeed, calibration_feeds, parity_feeds
from deploy.evidence.parity import Parity, Tolerance
from deploy.pipeline.written import check_unrounded, prove, source_cases
from deploy.precision.converted import Converted
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.convert import convert_onnx
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import Quantized, hint, quantize_onnx
from deploy.precision.int8.stored import Stored
from deploy.precision.prepare import Prepare
from deploy.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The graph that an engine is built from, as it is made, None for the artifact's own, and what the manifest says of it.

    feeds: what the graph is compared with `source` on; none where it is the artifact's own. stored: what it must hold where it was
    quantized here. emulated: half precision is emulated. remedy: what to try if it is too far off.
    """

    source: Artifact
    made: Quantized | Converted | None
    manifest: Manifest
    feeds: list[NamedFeed]
    stored: Stored | None = None
    emulated: bool = False
    remedy: str = ""

    def saved(self, path: Path) -> "Typed":
        """The same without the graph, which is written to `path`. The artifact's own is written again too: its external data may
        have another name there, and what TensorRT refuses or cannot name, as a bare file may have it, is put right."""
        if self.made is None:
            model = load_model(self.source.onnx_path)
            Prepare()(model)
            save_model(model, path)
        else:
            self.made.save(path)
        return replace(self, made=None)

    def proven(self, written: Artifact, tolerance: Tolerance, progress: Progress) -> Parity | None:
        """The parity of the written graph with the source; that of the artifact where the graph is its own. Raises ParityError."""
        if not self.feeds:
            return self.manifest.parity
        cases = source_cases(self.source, self.feeds)
        if self.stored is not None:
            check_unrounded(written, self.stored, cases, progress)
        return prove(
            written,
            cases,
            tolerance,
            against=self.source.manifest.digest,
            emulated=self.emulated,
            engine=True,
            remedy=self.remedy,
            progress=progress,
        )


def typed_graph(
    source: Artifact,
    data: CalibrationSet | None,
    *,
    quantize: QuantizeOptions | None,
    convert: ConvertOptions | None,
    profile: Profile,
    progress: Progress,
) -> Typed:
    """Quantize `source` or convert it, on `data`, where it is in FP32 and that is asked for; else take it as it is.

    profile: the first of the engine, whose optimum decides what is quantized.
    """
    manifest = _of_signed(source.manifest)
    if quantize is not None and manifest.precision == "fp32":
        assert data is not None
        return typed_quantized(source, data, quantize_onnx(source, data, quantize, progress, engine=profile), quantize)
    if convert is not None:
        converted = convert_onnx(source, data, convert, progress)
        changed = msgspec.structs.replace(
            manifest,
            precision=convert.precision,
            inputs=converted.inputs,
            outputs=converted.outputs,
            parity=None,
            accuracy=None,
            accuracies=[],
            exclusions=converted.exclusions,
        )
        feeds = parity_feeds(source, data, convert.profile)
        return Typed(source=source, made=converted, manifest=changed, feeds=feeds, emulated=True, remedy=converted.remedy)
    return Typed(source=source, made=None, manifest=manifest, feeds=[])


def typed_quantized(source: Artifact, data: CalibrationSet, quantized: Quantized, options: QuantizeOptions) -> Typed:
    """What was made of `source` with these options, calibrated on `data`."""
    changed = msgspec.structs.replace(
        _of_signed(source.manifest),
        precision=options.precision,
        parity=None,
        accuracy=None,
        accuracies=[],
        calibration=quantized.calibration,
        exclusions=quantized.exclusions,
    )
    return Typed(
        source=source,
        made=quantized,
        stored=quantized.stored,
        manifest=changed,
        feeds=calibration_feeds(source, data, quantized.feeds, quantized.expected),
        emulated=options.fp16,
        remedy=hint(quantized.calibration),
    )


def _of_signed(manifest: Manifest) -> Manifest:
    """The manifest without files, and without what it says of the CPU form."""
    signed = [each for each in manifest.accuracies if each.file is None]
    return msgspec.structs.replace(
        manifest, files={}, cpu_form=None, accuracies=signed, accuracy=signed[0] if signed else manifest.accuracy
    )

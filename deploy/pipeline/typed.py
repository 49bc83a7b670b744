"""The typed ONNX graph that an engine is built from: the artifact's own, or one quantized or converted on the way."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.artifact.onnxfile import load_model, save_model
from deploy.data.calibration_set import CalibrationSet
from deploy.precision.formats import ConvertOptions
from deploy.precision.half.convert import convert_onnx
from deploy.precision.int8.options import QuantizeOptions
from deploy.precision.int8.quantize import quantize_onnx
from deploy.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The graph that an engine is built from, None for the artifact's own, and what the manifest says of it."""

    source: Artifact
    model: ir.Model | None
    manifest: Manifest

    def save(self, path: Path) -> None:
        """Write the graph to `path`. The artifact's own is written again too: its external data may have another name there."""
        save_model(load_model(self.source.onnx_path) if self.model is None else self.model, path)


def typed_graph(
    source: Artifact,
    data: CalibrationSet | None,
    *,
    quantize: QuantizeOptions | None,
    convert: ConvertOptions | None,
    progress: Progress,
) -> Typed:
    """Quantize `source` on `data` or convert it, where it is in FP32 and that is asked for; else take it as it is."""
    manifest = msgspec.structs.replace(source.manifest, files={})
    if quantize is not None and manifest.precision == "fp32":
        assert data is not None
        quantized = quantize_onnx(source, data, quantize, progress)
        changed = msgspec.structs.replace(
            manifest,
            precision="int8",
            parity=quantized.parity,
            accuracy=None,
            calibration=quantized.calibration,
            exclusions=quantized.exclusions,
        )
        return Typed(source=source, model=quantized.model, manifest=changed)
    if convert is not None:
        converted = convert_onnx(source, convert, progress)
        changed = msgspec.structs.replace(
            manifest,
            precision=convert.precision,
            inputs=converted.inputs,
            outputs=converted.outputs,
            parity=converted.parity,
            accuracy=None,
            exclusions=converted.exclusions,
        )
        return Typed(source=source, model=converted.model, manifest=changed)
    return Typed(source=source, model=None, manifest=manifest)

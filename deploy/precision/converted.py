"""The result of a conversion to another number format."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Exclusion
from deploy.artifact.onnxfile import model_specs, save_model
from deploy.artifact.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A graph in another number format, its inputs and outputs, and the nodes left in FP32.

    remedy: what to try where it turns out to be too far off.
    """

    model: ir.Model
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    exclusions: list[Exclusion]
    remedy: str

    def save(self, path: Path) -> None:
        """Write the ONNX file, with large weights beside it. Raises OSError."""
        save_model(self.model, path)


def converted(artifact: Artifact, model: ir.Model, exclusions: list[Exclusion], remedy: str) -> Converted:
    """`model`, made from the graph of `artifact`: names and symbolic dimensions stay as the user knows them."""
    inputs, outputs = model_specs(model)
    return Converted(
        model=model,
        inputs=_with_dtypes(artifact.manifest.inputs, inputs),
        outputs=_with_dtypes(artifact.manifest.outputs, outputs),
        exclusions=exclusions,
        remedy=remedy,
    )


def _with_dtypes(specs: list[TensorSpec], found: list[TensorSpec]) -> list[TensorSpec]:
    assert [spec.name for spec in specs] == [spec.name for spec in found]
    return [dataclasses.replace(spec, dtype=other.dtype) for spec, other in zip(specs, found, strict=True)]

"""What comes of a conversion to another number format."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy.artifact.manifest import Exclusion
from deploy.artifact.onnxfile import save_model
from deploy.artifact.tensors import TensorSpec
from deploy.evidence.parity import Parity


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A graph in another number format, its inputs and outputs, the nodes left in FP32 and its parity with the FP32 graph."""

    model: ir.Model
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    exclusions: list[Exclusion]
    parity: Parity

    def save(self, path: Path) -> None:
        """Write the ONNX file, with the weights beside it where they exceed 2 GB. Raises OSError."""
        save_model(self.model, path)

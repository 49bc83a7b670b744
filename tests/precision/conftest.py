"""Small ONNX graphs from ONNX's own text form, and the passes applied to them.

The tests state graphs and look at results as ONNX protos; the passes work on onnx_ir models.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from deploy.artifact.manifest import Exclusion
from deploy.precision.codes import INT8
from deploy.precision.cpu import CpuGraph
from deploy.precision.half.emulate import Emulate
from deploy.precision.half.options import OPSET, HalfPrecision
from deploy.precision.half.rewrite import ToHalf
from deploy.precision.int8 import placement
from deploy.precision.int8.equalize import Equalize
from deploy.precision.int8.folding import FoldBatchNorm
from deploy.precision.int8.placement import Placement, Selection
from deploy.precision.int8.rewrite import ToCodes
from deploy.precision.passes import PrecisionPass
from deploy.precision.prepare import Prepare

Parse = Callable[..., onnx.ModelProto]


@pytest.fixture
def parse() -> Parse:
    def parse_graph(text: str, opset: int = 20) -> onnx.ModelProto:
        return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "my": 1]> {text}')

    return parse_graph


def apply(precision_pass: PrecisionPass, model: onnx.ModelProto) -> onnx.ModelProto:
    return ir.to_proto(precision_pass(ir.from_proto(model)).model)


def prepare(model: onnx.ModelProto, *, opset: int = 1) -> onnx.ModelProto:
    return apply(Prepare(opset=opset), model)


def prepared(model: onnx.ModelProto, *, opset: int = 1) -> ir.Model:
    return Prepare(opset=opset)(ir.from_proto(model)).model


def to_half(
    model: onnx.ModelProto, precision: HalfPrecision, *, half_io: bool = False, keep: Mapping[str, str] | None = None
) -> tuple[onnx.ModelProto, list[Exclusion]]:
    """`model`, which need not be prepared, in half precision, and the nodes left in FP32."""
    convert = ToHalf(precision, half_io=half_io, keep=keep)
    return apply(convert, prepare(model, opset=OPSET[precision])), convert.exclusions


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    return apply(Emulate(), model)


def fold_batchnorm(model: onnx.ModelProto) -> onnx.ModelProto:
    return apply(FoldBatchNorm(), model)


def equalize(model: onnx.ModelProto, *, outliers: bool = False) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The equalized model, and the names of the changed layers."""
    equalizing = Equalize(outliers=outliers)
    return apply(equalizing, model), equalizing.layers


def to_int8(model: onnx.ModelProto, placement: Placement, scales: Mapping[str, float], **options: Any) -> onnx.ModelProto:
    return apply(ToCodes(placement, scales, INT8, **options), model)


def place(model: onnx.ModelProto, selection: Selection, *, stay: Mapping[str, str] | None = None) -> Placement:
    return placement.place(ir.from_proto(model), selection, stay=stay)


def cpu_graph(model: onnx.ModelProto) -> CpuGraph:
    return CpuGraph(ir.from_proto(model))

"""The layers of a built engine, as TensorRT's inspector describes them: which nodes each computes, and in which precision.

The forms are those of descriptions that NVIDIA published with trt-engine-explorer, and of its documentation and tools for TensorRT 11
("Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploy.engine.bindings import Bindings
from deploy.errors import EngineError

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """A layer of a built engine.

    kind: TensorRT's name for it. nodes: the ONNX nodes fused into it. precision: of its multiplications; None where the
    description does not tell. sums: the precision in which it adds up products, None where that is not told.
    role: `computes` products, is `fused` (generated code, which may) or `moves` data.
    by_weights: only the type of the weights tells the precision.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    precision: str | None
    sums: str | None = None
    role: Literal["computes", "fused", "moves"]
    by_weights: bool = False


def describe(
    engine: "tensorrt.ICudaEngine", context: "tensorrt.IExecutionContext | None", trt: Bindings, inputs: Sequence[str]
) -> str:
    """The inspector's description of `engine`, as JSON. inputs: their names.

    `context` gets the optimal shapes of the first profile: without shapes, the inspector hides the formats of all tensors of
    an engine with dynamic shapes (IEngineInspector::setExecutionContext). None, where there is no room for one, leaves them hidden.
    """
    inspector = engine.create_engine_inspector()
    if context is not None:
        for name in inputs:
            _, optimum, _ = engine.get_tensor_profile_shape(name, 0)
            context.set_input_shape(name, optimum)
        inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def engine_layers(information: str) -> list[EngineLayer]:
    """The layers in the inspector's JSON description of an engine that was built with detailed verbosity.

    The name of a tactic tells the types (`..._i8i8_i8i32_f32_...`: of the inputs, of products and sums, of the output). Where
    there is no such name, the precision is the type of the first input that is no index or mask, and where that is not told (`N/A
    due to dynamic shapes`), the type of the weights. Raises EngineError if the description cannot be read.
    """
    try:
        described = json.loads(information)["Layers"]
        return [_layer(layer) for layer in described]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"the inspector's description of the engine cannot be read: {error!r}") from error


_NODE = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]+?)\](?=[\x1e\x1f]|\[ONNX Layer: |$)")
"""A node in the metadata of a layer; its name may have brackets. TensorRT puts a record or unit separator between nodes."""

_MYELIN_NUMBER = re.compile(r"_myl\d+_\d+$")
"""What the compiler of fused layers adds to the name of a node that it keeps."""

_TYPE = r"(?:i8|s8|i32|s32|e4m3|e5m2|f8|bf16|tf32|f16|f32|f64)"
_TACTICS = (
    re.compile(rf"_{_TYPE}+_({_TYPE})({_TYPE})_{_TYPE}+(?=_|$)"),  # sm80_xmma_gemm_f32f32_tf32f32_f32_nn
    re.compile(rf"gemm_({_TYPE})_{_TYPE}_({_TYPE})_"),  # cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_f16_f16_
    re.compile(rf"_({_TYPE}){_TYPE}+(?=_|$)()"),  # ..._hmma_fprop_f16f16f32_nhwc
)
"""Names of tactics; the groups are the type of the products, and that of the sums."""
_HALF_SUMS = re.compile(r"_h(?:884|1688|16816)")
"""ampere_h16816cudnn_...: products and sums in FP16 (CUTLASS, "Naming convention": h for FP16 and s for FP32 sums)."""
_PRECISIONS = {
    "i8": "int8",
    "s8": "int8",
    "e4m3": "fp8",
    "f8": "fp8",
    "f16": "fp16",
    "bf16": "bf16",
    "tf32": "tf32",
    "f32": "fp32",
}

_INDEX = re.compile(r"\b(?:int32|int64|bool|uint8)\b", re.IGNORECASE)
_DATATYPE = re.compile(r"\b(int8|fp8|float8|e4m3|half|fp16|bfloat16|bf16|float|fp32)\b", re.IGNORECASE)
_DATATYPES = {
    "int8": "int8",
    "fp8": "fp8",
    "float8": "fp8",
    "e4m3": "fp8",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float": "fp32",
    "fp32": "fp32",
}

_COMPUTES = re.compile(r"conv|gemm|matmul|matrix_?multiply|mha|xmma|cutlass|fprop|dgrad", re.IGNORECASE)
_FUSED_PRODUCT = re.compile(r"_gemm|__myl_\w*Fc")
"""The beginning of the name of generated code that holds a matrix product."""
_FUSED = ("kgen", "fusion", "foreignnode", "myelin")


def _layer(described: Mapping[str, Any] | str) -> EngineLayer:
    if isinstance(described, str):  # without detailed verbosity there are only names
        raise TypeError("layers are names alone: the engine was built without detailed verbosity")
    name, kind, tactic = (str(described.get(key) or "") for key in ("Name", "LayerType", "TacticName"))
    precision, sums = _tactic_precision(tactic)
    precision = precision or _tensor_precision(described.get("Inputs") or [])
    by_weights = precision is None
    if by_weights:
        precision = _weights_precision(described)
    return EngineLayer(
        name=described["Name"],
        kind=kind,
        nodes=nodes_in(str(described.get("Metadata") or "")) or _named(name),
        precision=precision,
        sums=sums,
        role=_role(name, kind, tactic),
        by_weights=by_weights,
    )


def nodes_in(metadata: str) -> tuple[str, ...]:
    """The names of the ONNX nodes in the metadata that TensorRT's parser and inspector give to a layer."""
    return tuple(_NODE.findall(metadata))


def _named(name: str) -> tuple[str, ...]:
    """What the layer's own name says of nodes, where its metadata is empty: `conv1 + relu1`, `fc_myl5_155`."""
    return tuple(_MYELIN_NUMBER.sub("", part) for part in name.split(" + "))


def _tactic_precision(tactic: str) -> tuple[str | None, str | None]:
    """The precision of the products and of the sums, as far as the name of the tactic tells them."""
    for pattern in _TACTICS:
        if found := pattern.search(tactic):
            return _PRECISIONS.get(found[1]), _PRECISIONS.get(found[2])
    if _HALF_SUMS.search(tactic):
        return "fp16", "fp16"
    return ("tf32", None) if "tf32" in tactic else (None, None)


def _tensor_precision(tensors: Sequence[Mapping[str, Any]]) -> str | None:
    """The type of the first tensor that is no index or mask: `Format/Datatype` in TensorRT 10; in 11, `Datatype` beside `Format`."""
    texts = (str(value) for each in tensors for key, value in each.items() if key.lower().endswith("datatype"))
    return _datatype(next((text for text in texts if not _INDEX.search(text)), ""))


def _weights_precision(described: Mapping[str, Any]) -> str | None:
    """The type of the weights, of a convolution, or of the constants of generated code."""
    weights = described.get("Weights")
    if isinstance(weights, dict):
        return _datatype(str(weights.get("Type")))
    return _tensor_precision(described.get("Constants") or [])


def _datatype(text: str) -> str | None:
    found = _DATATYPE.search(text)
    return _DATATYPES[found[1].lower()] if found else None


def _role(name: str, kind: str, tactic: str) -> Literal["computes", "fused", "moves"]:
    if _COMPUTES.search(f"{kind} {tactic}") or _FUSED_PRODUCT.match(name):
        return "computes"
    return "fused" if any(word in kind.lower() for word in _FUSED) else "moves"

"""Small ONNX graphs that engines are built from, and layers as TensorRT describes them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploy.artifact.tensors import Profile, ShapeRange
from deploy.engine.builder import BuiltEngine, build_engine
from deploy.engine.flavour import Flavour
from deploy.engine.options import BuildOptions

SHAPES: Profile = {"x": ShapeRange(min=(1, 3, 8, 8), opt=(4, 3, 8, 8), max=(8, 3, 8, 8))}

# A convolution in `T` and a matrix product in FP32; {c} casts between them.
MIXED = """
    <ir_version: 10, opset_import: ["" : 20]>
    mixed (float[batch, 3, 8, 8] x) => (float[batch, 5] y)
    <{t}[8, 3, 3, 3] w, float[8, 5] v> {{
        [in] a = Cast<to = {code}>(x)
        [stem] b = Conv<pads = [1, 1, 1, 1]>(a, w)
        [pool] c = GlobalAveragePool(b)
        [flat] d = Flatten(c)
        [out] e = Cast<to = 1>(d)
        [head] y = MatMul(e, v)
    }}
"""


def save(text: str, path: Path) -> Path:
    """Write a graph; tensors that are declared and not computed become initializers full of ones."""
    model = onnx.parser.parse_model(text)
    for value in model.graph.value_info:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        ones = np.ones(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        model.graph.initializer.append(onnx.numpy_helper.from_array(ones, value.name))
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def mixed(path: Path, precision: str) -> Path:
    name, code = {"fp16": ("float16", 10), "bf16": ("bfloat16", 16), "fp32": ("float", 1)}[precision]
    return save(MIXED.format(t=name, code=code), path)


def build(rtx: Flavour, path: Path, profile: Profile = SHAPES, options: BuildOptions | None = None) -> BuiltEngine:
    return build_engine(rtx, path, [profile], options or BuildOptions())


HIDDEN = "N/A due to dynamic shapes"
"""What the inspector says of the format of a tensor when it is not given the shapes."""


def layer(
    name: str, kind: str, tactic: str = "", *nodes: str, inputs: str = HIDDEN, weights: str | None = None
) -> dict[str, Any]:
    """A layer as the inspector describes it, cut down; the separator of nodes is TensorRT's. No nodes: no metadata."""
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [-1, 3, 32, 32], "Format/Datatype": inputs}
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor],
        "Outputs": [tensor],
        **({"Weights": {"Type": weights, "Count": 864}} if weights else {}),
        **({"TacticName": tactic} if tactic else {}),
        "TacticValue": "0x0000000000000000",
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }

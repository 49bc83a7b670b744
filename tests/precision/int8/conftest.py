"""Prepared graphs from ONNX's own text form, with random weights."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.precision.conftest import prepare

Build = Callable[[str], onnx.ModelProto]


@pytest.fixture
def build() -> Build:
    """A graph in text to a prepared model; tensors that are declared and not computed become random float32 weights.

    The shape of an output that is written `float[]` is inferred.
    """

    def build_graph(text: str) -> onnx.ModelProto:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19, "my": 1]> {text}')
        rng = np.random.default_rng(0)
        for value in model.graph.value_info:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            weight = rng.normal(size=shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
        del model.graph.value_info[:]
        return prepare(onnx.shape_inference.infer_shapes(model), opset=19)

    return build_graph


@pytest.fixture
def build_with(parse):
    """A prepared graph from text; float arrays become weights, others constants."""

    def build_model(text, **weights):
        model = parse(text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
        return prepare(model, opset=19)

    return build_model

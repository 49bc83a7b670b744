"""Small ONNX graphs from ONNX's own text form."""

from collections.abc import Callable

import onnx
import pytest

Parse = Callable[..., onnx.ModelProto]


@pytest.fixture
def parse() -> Parse:
    def parse_graph(text: str, opset: int = 20) -> onnx.ModelProto:
        return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "my": 1]> {text}')

    return parse_graph

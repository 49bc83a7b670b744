"""Bare ONNX files."""

from pathlib import Path

import onnx
import pytest

from deploy.artifact.onnxfile import open_onnx
from deploy.errors import ArtifactError


def test_an_operator_that_onnx_does_not_have_is_named_with_its_file_and_node(tmp_path: Path) -> None:
    graph = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) [odd] y = Swirl(a) }'
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "odd.onnx")
    with pytest.raises(
        ArtifactError, match=r"odd\.onnx is not a valid ONNX file: No Op registered for Swirl .*\(node 'odd', Swirl\)$"
    ):
        open_onnx(tmp_path / "odd.onnx")

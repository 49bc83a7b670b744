"""`deploy.verify.eager`: the export against the module that it was made from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError
from deploy.verify.verify import verify
from tests.verify.conftest import Write

Reference = Callable[[str], Artifact]


def test_an_export_agrees_with_its_module_in_every_layer(reference: Reference) -> None:
    source = reference("mobilenet_v1")
    found = verify(source, source, eager=True)
    assert ([layer.node for layer in found.culprits], found.beyond) == ([], [])
    convolutions = [layer for layer in found.layers if layer.operator == "Conv"]
    assert len(convolutions) == 27  # the batch normalization behind each is folded into it
    assert any(layer.local.error > 0 for layer in convolutions)
    assert all(layer.local.floor > 0 for layer in convolutions)


def test_a_layer_that_is_not_the_modules_is_named(reference: Reference, tmp_path: Path) -> None:
    source = reference("mobilenet_v1")
    model = onnx.load(source.onnx_path)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][5]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == conv.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    found = verify(source, tmp_path / "other.onnx", eager=True)
    assert [layer.node for layer in found.culprits] == [conv.name]
    assert found.beyond == ["logits"]


def test_a_bare_file_has_no_module(write: Write) -> None:
    with pytest.raises(UsageError, match="no module"):
        verify(write("a.onnx"), write("b.onnx"), eager=True)

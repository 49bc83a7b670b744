"""Layers of real backends, and the ONNX nodes and torch modules that they are made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.host.cpu import has_vnni
from deploy.runtime.layers import named_layers, shares
from deploy.runtime.load import open_session
from deploy.runtime.profiling import LayerTime


@pytest.fixture(scope="module")
def resnet(reference: Callable[[str], Artifact]) -> Artifact:
    return reference("resnet18")


def layers(artifact: Artifact, backend: str, shape: tuple[int, ...], runs: int = 3) -> list[LayerTime]:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with open_session(artifact, backend) as session:
        return named_layers(artifact, session.onnx_file, session.layer_times({"input": x}, runs=runs))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_node_of_a_graph_is_in_one_layer_and_convolutions_lead_to_their_modules(resnet: Artifact, backend: str) -> None:
    found = layers(resnet, backend, (1, 3, 64, 64))
    graph = onnx.load(resnet.onnx_path, load_external_data=False).graph
    owners = {node: layer for layer in found for node in layer.nodes}
    assert {node.name for node in graph.node if node.op_type != "Constant"} <= owners.keys()
    for node in graph.node:
        if node.op_type == "Conv":
            layer = next(layer for layer in found if node.name in layer.nodes and layer.operator.startswith("Conv"))
            assert node.name.removesuffix("/Conv") in layer.modules
            assert sum(each.endswith("/Conv") for each in layer.nodes) == 1
    # What follows a convolution is fused into it, its activation by the name of the module.
    first = next(layer for layer in found if "conv1/Conv" in layer.nodes and layer.operator.startswith("Conv"))
    assert first.modules == ("conv1", "relu")
    assert all(layer.ms > 0 for layer in found if "Conv" in layer.operator)


@pytest.mark.skipif(not has_vnni(), reason="the processor has no VNNI: ONNX Runtime runs the signed file here")
def test_layers_of_the_cpu_form_of_int8_lead_to_their_modules(resnet: Artifact, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    made = deploy.quantize(resnet, tmp_path / "int8", calib=[{"input": x}])
    found = {layer.modules: layer for layer in layers(made, "onnxruntime", x.shape) if layer.operator == "QLinearConv"}
    assert ("conv1", "relu") in found
    assert ("layer1.0.conv2",) in found
    assert len(found) == sum(node.op_type == "Conv" for node in onnx.load(resnet.onnx_path).graph.node)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_the_layers_take_about_as_long_as_a_run(resnet: Artifact, backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    import time

    with open_session(resnet, backend) as session:
        session.warmup({"input": x})
        whole = []
        for _ in range(9):
            start = time.perf_counter()
            session.run({"input": x})
            whole.append((time.perf_counter() - start) * 1e3)
        told = sum(layer.ms for layer in session.layer_times({"input": x}))
    assert 0.3 < told / np.median(whole) < 3


def test_a_layer_that_is_named_after_its_bias_has_the_product_too(tmp_path: Path) -> None:
    """OpenVINO calls the layers of a MatMul and an Add after the Add: the product is not of the layer before."""
    rng = np.random.default_rng(0)
    nodes, arrays = [], {}
    for at in range(3):
        arrays |= {f"w{at}": rng.standard_normal((64, 64)) / 8, f"b{at}": rng.standard_normal(64), f"s{at}": np.ones(64)}
        nodes += [
            onnx.helper.make_node("MatMul", [f"x{at}", f"w{at}"], [f"m{at}"], name=f"fc{at}/MatMul"),
            onnx.helper.make_node("Add", [f"m{at}", f"b{at}"], [f"a{at}"], name=f"fc{at}/Add"),
            onnx.helper.make_node(
                "LayerNormalization", [f"a{at}", f"s{at}"], [f"x{at + 1}"], name=f"norm{at}/LayerNormalization"
            ),
        ]
    specs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 8, 64]) for name in ("x0", "x3")]
    held = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "layers", specs[:1], specs[1:], held)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    artifact = deploy.export(tmp_path / "fc", onnx=tmp_path / "a.onnx")
    with open_session(artifact, "openvino") as session:
        feed = {"x0": rng.standard_normal((4, 8, 64)).astype(np.float32)}
        found = named_layers(artifact, artifact.onnx_path, session.layer_times(feed))
    products = [layer.nodes[:2] for layer in found if layer.operator == "FullyConnected"]
    assert products == [(f"fc{at}/MatMul", f"fc{at}/Add") for at in range(3)]


def test_eager_layers_are_modules_with_their_own_time_and_their_nodes(resnet: Artifact) -> None:
    found = {layer.modules[0]: layer for layer in layers(resnet, "eager", (1, 3, 64, 64), runs=15)}
    assert found["layer1.0.conv1"].operator == "Conv2d"
    assert found["layer1.0.conv1"].nodes == ("layer1.0.conv1/Conv",)
    assert found["layer1.0.bn1"].nodes == ()  # folded into the convolution
    assert found["layer1.0"].operator == "BasicBlock"
    assert found["layer1.0"].nodes == ("layer1.0/Add",)
    assert found["layer1.0"].ms < found["layer1.0.conv1"].ms + found["layer1.0.conv2"].ms
    assert found[""].name == "ResNet"


def test_compiled_modules_tell_their_operators(shared_lenet5: Artifact) -> None:
    found = layers(shared_lenet5, "compile", (1, 1, 28, 28))
    assert found
    assert all(layer.ms > 0 for layer in found)
    assert all(layer.modules == () for layer in found if "/" not in layer.name)


def test_a_backend_that_cannot_tell_says_so(shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match="null does not report the time of its layers"):
        layers(shared_lenet5, "null", (1, 1, 28, 28))


def told(*names: str, operator: str = "Conv", **more: Any) -> list[LayerTime]:
    return [LayerTime(name=name, operator=operator, ms=1.0, **more) for name in names]


def test_nodes_that_the_backend_names_itself_are_taken_as_they_are(shared_lenet5: Artifact) -> None:
    nodes = [node.name for node in onnx.load(shared_lenet5.onnx_path).graph.node]
    found = named_layers(
        shared_lenet5, shared_lenet5.onnx_path, [*told("myelin", nodes=tuple(nodes[:3])), *told(*nodes[3:], operator="")]
    )
    assert found[0].nodes == tuple(nodes[:3])
    assert [layer.nodes for layer in found[1:]] == [(node,) for node in nodes[3:]]


def test_of_a_bare_onnx_file_there_are_nodes_and_no_modules(tiny_onnx: Any, tmp_path: Any) -> None:
    artifact = deploy.export(tmp_path / "tiny", onnx=tiny_onnx)
    node = onnx.load(artifact.onnx_path).graph.node[0]
    (found,) = named_layers(artifact, artifact.onnx_path, told(node.name or node.output[0], operator=node.op_type))
    assert found.modules == ()


def test_shares_are_of_the_sum_and_the_longest_come_first() -> None:
    found = [LayerTime(name=str(ms), operator="", ms=ms) for ms in (1.0, 3.0)]
    assert [(layer.name, share) for layer, share in shares(found)] == [("3.0", 0.75), ("1.0", 0.25)]

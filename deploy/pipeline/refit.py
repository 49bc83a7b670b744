"""New weights for an engine that was built without: the same plan beside another typed ONNX file; nothing is built."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.artifact.manifest import ENGINE
from deploy.artifact.onnxfile import load_graph
from deploy.engine.builder import BuiltEngine
from deploy.engine.flavour import Flavour, load_flavour
from deploy.engine.network import parse_network
from deploy.errors import BackendError, EngineError, UsageError


def open_stripped(path: Path) -> tuple[Artifact, Flavour]:
    """The engine at `path`, which was built without weights, and its flavour as it is installed.

    Raises UsageError for anything else, ArtifactError for a damaged one, BackendError if its version is not installed.
    """
    engine = open_artifact(path)
    target = engine.manifest.target
    if target is None or not target.stripped:
        raise UsageError(f"`refit_from`: {engine.shown} is no engine without weights: build one with `strip`")
    engine.verify(weights=False)
    flavour = load_flavour(target.flavour)
    if flavour.version != target.version:
        raise BackendError(f"{engine.shown} was built with {target.flavour} {target.version}, and {flavour.version} is installed")
    return engine, flavour


def refitted(engine: Artifact, onnx_path: Path, flavour: Flavour, shown: str) -> BuiltEngine:
    """The plan of `engine` for the typed ONNX file at `onnx_path`, whose weights it gets when it is loaded.

    shown: the name of the file in errors. Raises EngineError if its network is not that of the engine.
    """
    if difference := network_difference(onnx_path, engine.onnx_path):
        raise EngineError(f"{shown} is not the network of {engine.shown}: {difference}; build an engine for it")
    target = engine.manifest.target
    assert target is not None
    network = parse_network(flavour, onnx_path, shown=shown)
    return BuiltEngine(plan=(engine.path / ENGINE).read_bytes(), network=network, target=target)


def network_difference(ours: Path, theirs: Path) -> str | None:
    """What first tells the network in one ONNX file from that in another, in a phrase; None where weights alone do.

    Weights are initializers in floating point, and integers that DequantizeLinear makes floating point. All else is built into an
    engine: nodes, shapes, tables of integers, and the scales of quantization.
    """
    our, their = load_graph(ours).graph, load_graph(theirs).graph
    for mine, other in zip_longest(_nodes(our), _nodes(their)):
        if mine != other:
            name, operator, _ = mine or other or ("", "", b"")
            return f"node {name!r} ({operator}) is not the same in both"
    for kind in ("input", "output"):
        mine, other = ([_plain(value) for value in getattr(graph, kind)] for graph in (our, their))
        if mine != other:
            return f"its {kind}s are others"
    return _initializer_difference(our, their, ours.parent, theirs.parent)


def _nodes(graph: onnx.GraphProto) -> Iterator[tuple[str, str, bytes]]:
    for node in graph.node:
        yield node.name, node.op_type, _plain(node)


def _plain(message: onnx.NodeProto | onnx.ValueInfoProto) -> bytes:
    """All that a node, or an input, means."""
    kept = type(message)()
    kept.CopyFrom(message)
    kept.ClearField("doc_string")
    kept.ClearField("metadata_props")
    return bytes(kept.SerializeToString(deterministic=True))


def _initializer_difference(ours: onnx.GraphProto, theirs: onnx.GraphProto, our_folder: Path, their_folder: Path) -> str | None:
    mine: Mapping[str, onnx.TensorProto] = {tensor.name: tensor for tensor in ours.initializer}
    others = {tensor.name: tensor for tensor in theirs.initializer}
    if strangers := sorted(mine.keys() ^ others.keys()):
        return f"{strangers[0]!r} is not in both"
    scales, quantized = _quantization(ours)
    for name, tensor in mine.items():
        other = others[name]
        if (tensor.data_type, list(tensor.dims)) != (other.data_type, list(other.dims)):
            return f"{name!r} has another type or shape"
        if name not in scales and (name in quantized or tensor.data_type in _FLOATS):
            continue
        value, expected = (
            onnx.numpy_helper.to_array(tensor, str(our_folder)),
            onnx.numpy_helper.to_array(other, str(their_folder)),
        )
        if not np.array_equal(value, expected):
            kind = "a scale or zero point of quantization" if name in scales else "a constant that is no weight"
            return f"{name!r}, {kind}, has other values"
    return None


def _quantization(graph: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """The names of scales and zero points, and of what is dequantized with them."""
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {name for node in pairs for name in node.input[1:]}, {node.input[0] for node in pairs}


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)

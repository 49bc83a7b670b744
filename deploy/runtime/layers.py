"""The ONNX nodes and torch modules that a backend's layers consist of.

Backends fuse nodes, and name the fused layer after one of the nodes, or after a tensor. A node that no layer is named after
was fused into the layer that computes its inputs.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from deploy.artifact.artifact import Artifact
from deploy.runtime.profiling import LayerTime

_MARKS = ("fused ",)
"""Prefixes that ONNX Runtime puts before a name."""

_ONNX = {
    "Convolution": ("Conv",),
    "Deconvolution": ("ConvTranspose",),
    "FullyConnected": ("MatMul", "Gemm"),
    "FullyConnectedQuantizedLegacy": ("MatMul", "Gemm"),
    "GroupConvolution": ("Conv",),
}
"""The operators of ONNX that those of OpenVINO come from, where their names differ."""

_SERIAL = re.compile(r"_token_\d+$")
"""What ONNX Runtime puts behind a name to make it unique."""


def named_layers(artifact: Artifact, onnx_file: Path, layers: Sequence[LayerTime]) -> list[LayerTime]:
    """The layers of a run of `onnx_file` of `artifact`, or of the module that it descends from, with their nodes and modules.

    Torch modules are known if `deploy export` made the ONNX file from a module: it names every node `MODULE/OPERATOR`.
    """
    root = artifact.root()
    exported = onnx.load(root.onnx_path, load_external_data=False).graph
    modules = {module_of(node.name) for node in exported.node} if root.manifest.source.factory is not None else set()
    if any(layer.modules for layer in layers):
        by_module = [tuple(node.name for node in exported.node if module_of(node.name) in layer.modules) for layer in layers]
        return [replace(layer, nodes=part) for layer, part in zip(layers, by_module, strict=True)]
    nodes = _nodes(onnx.load(onnx_file, load_external_data=False).graph, layers)
    return [replace(layer, nodes=part, modules=_modules(part, modules)) for layer, part in zip(layers, nodes, strict=True)]


def module_of(node: str) -> str:
    """`layer1.0.conv1/Conv_2` -> `layer1.0.conv1`; empty for the module itself."""
    return node.rpartition("/")[0]


def _modules(nodes: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """The modules of the nodes; a QuantizeLinear or DequantizeLinear of a weight belongs to the module of that weight."""
    names = [module_of(node) for node in nodes]
    names = [name if name in known else name.removesuffix(".weight") for name in names]
    return tuple(dict.fromkeys(name for name in names if name in known))


def _nodes(graph: onnx.GraphProto, layers: Sequence[LayerTime]) -> list[tuple[str, ...]]:
    """The nodes of each layer."""
    nodes = {node.name: node for node in graph.node if node.op_type != "Constant"}
    producers = {name: node for node in nodes.values() for name in node.output}
    order = {name: index for index, name in enumerate(nodes)}
    owners: dict[str, int] = {}  # node -> layer
    anchored: list[str | None] = []
    for index, layer in enumerate(layers):
        for name in layer.nodes:
            owners.setdefault(name, index)
        anchor, exact = (None, False) if layer.nodes else _anchor(layer.name, nodes, producers)
        anchored.append(anchor)
        if anchor is not None and exact:
            owners.setdefault(anchor, index)
            kinds = _ONNX.get(layer.operator, ())
            # Named after its output, or after a bias: follow the graph back to the operator that computes it.
            if layer.name not in nodes or (kinds and nodes[anchor].op_type not in kinds):
                for name in _chain(nodes[anchor], (*kinds, layer.operator.removeprefix("Fused")), producers):
                    owners.setdefault(name, index)
    for name in sorted(nodes, key=order.__getitem__):
        if name not in owners:
            makers = [producers[value].name for value in nodes[name].input if value in producers]
            known = [maker for maker in makers if maker in owners]
            if known:
                owners[name] = owners[max(known, key=order.__getitem__)]
    members: list[list[str]] = [[] for _ in layers]
    for name in sorted(owners, key=lambda name: order.get(name, -1)):
        members[owners[name]].append(name)
    return [tuple(members[index]) or ((anchor,) if anchor is not None else ()) for index, anchor in enumerate(anchored)]


def _anchor(name: str, nodes: dict[str, onnx.NodeProto], producers: dict[str, onnx.NodeProto]) -> tuple[str | None, bool]:
    """The node that a layer is named after, and whether the name is exact: that of the node or its output, and not only a part of it."""
    for mark in _MARKS:
        name = name.removeprefix(mark)
    name = _SERIAL.sub("", name)
    if name in nodes:
        return name, True
    if (base := name.removesuffix("_nchwc")) in producers:
        return producers[base].name, True
    longest = max(_parts(name, (*nodes, *producers)), key=len, default=None)
    if longest is None:
        return None, False
    anchor = longest if longest in nodes else producers[longest].name
    return anchor, name.removeprefix(longest).startswith("/WithoutBiases")


def _parts(name: str, known: Iterable[str]) -> Iterable[str]:
    """The names in `known` that `name` begins or ends with, separated by `_` or `/`."""
    return (
        part for part in known if part and (name.startswith((f"{part}_", f"{part}/")) or name.endswith((f"_{part}", f"/{part}")))
    )


def _chain(last: onnx.NodeProto, operators: Collection[str], producers: dict[str, onnx.NodeProto]) -> list[str]:
    """The nodes from `last` back to the nearest node of these operators, along the first path to it; empty if there is none."""
    ways = [[last]]
    seen = {last.name}
    while ways:
        way = ways.pop(0)
        if way[-1].op_type in operators:
            return [node.name for node in way]
        if len(way) > 4:
            continue
        # The first operand comes first: at an Add after a convolution, the convolution and not the shortcut.
        for value in way[-1].input:
            node = producers.get(value)
            if node is not None and node.name not in seen:
                seen.add(node.name)
                ways.append([*way, node])
    return []


def shares(layers: Sequence[LayerTime]) -> list[tuple[LayerTime, float]]:
    """The layers with their shares of the total time, the longest first."""
    whole = sum(layer.ms for layer in layers)
    return [(layer, layer.ms / whole if whole else 0.0) for layer in sorted(layers, key=lambda layer: -layer.ms)]

"""`deploy verify` on faults of known place: is the right node first?

    python benchmarks/verify_faults.py [--faults 100] [--quick]

Five networks in FP32, FP16 and INT8. Each fault is planted into the ONNX file of B, in a node drawn by a seed, and made as small as it
can be and still be beyond the floor: the smallest power of two that changes what the node makes of its input by three times the floor, and by what chance makes of few
numbers on top. A third of the files have two. Kinds: the scale of an activation or of a weight, a weight, rounding to a coarser grid, swapped axes of a
weight, an overflow of FP16, a zero point; swapped axes and an overflow have no size. Goal: the right node first in 95 of 100.
"""

import bisect
import functools
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, make_parser, markdown, publish

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model, save_model
from deploy.precision.cpu import CpuGraph
from deploy.progress import silent
from deploy.verify.graphs import LOCAL, Graph, cut, paired
from deploy.verify.measure import Comparison
from deploy.verify.verify import verification_feed, verify

NETS: dict[str, dict[str, Any]] = {
    "lenet5": {"arch": "lenet5"},
    "resnet18": {"arch": "resnet18", "inputs": ["input=1x3x64x64"]},
    "mobilenet_v1": {"arch": "mobilenet_v1", "inputs": ["input=1x3x64x64"]},
    "rangeseg": {"arch": "rangeseg"},
    "vit_tiny": {"arch": "timm:vit_tiny_patch16_224", "model_args": {"img_size": 64}, "inputs": ["input=1x3x64x64"]},
}
TIMES = 3.0
SIZES = [2.0**power for power in range(-34, 6)]
ROWS = 16
"""Rows of random input that INT8 is calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """plant(model, node, size): changes the model in place. sized: whether `size` means anything."""

    kind: str
    precisions: tuple[str, ...]
    fits: Callable[[ir.Node], bool]
    plant: Callable[[ir.Model, ir.Node, float], None]
    sized: bool = True


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that holds the weight of a layer, past Q/DQ and Casts; None where there is none."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("DequantizeLinear", "Cast", "Transpose"):
            return None
        value = maker.inputs[0]
    return value if value is not None and value.const_value is not None and len(value.uses()) == 1 else None


def dequantize_of(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" and len(maker.outputs[0].uses()) == 1 else None


def new_constant(model: ir.Model, array: np.ndarray, like: ir.Value) -> ir.Value:
    name = f"planted_{len(model.graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name, dtype=like.dtype))
    value.type, value.shape = like.type, ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def change_weight(model: ir.Model, node: ir.Node, size: float) -> None:
    """One element, the largest, grows."""
    value = weight_of(node)
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    place = np.unravel_index(int(np.argmax(np.abs(array.astype(np.float64)))), array.shape)
    array[place] = array[place] * (1 + size)
    value.const_value = ir.tensor(array, name=value.name)


def change_channel(model: ir.Model, node: ir.Node, size: float) -> None:
    """The scale of all channels of the INT8 weight."""
    dequantize = dequantize_of(node, 1)
    assert dequantize is not None
    scale = dequantize.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    dequantize.replace_input_with(1, new_constant(model, scale.const_value.numpy() * np.float32(1 + size), scale))


def change_activation(model: ir.Model, node: ir.Node, size: float) -> None:
    """The scale that an activation is read back with."""
    dequantize = dequantize_of(node, 0)
    assert dequantize is not None
    scale = dequantize.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    dequantize.replace_input_with(1, new_constant(model, scale.const_value.numpy() * np.float32(1 + size), scale))


def change_zero_point(model: ir.Model, node: ir.Node, size: float) -> None:
    dequantize = dequantize_of(node, 0)
    assert dequantize is not None
    zero = dequantize.inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    dequantize.replace_input_with(2, new_constant(model, zero.const_value.numpy() + np.int8(max(1, round(size))), zero))


def round_output(model: ir.Model, node: ir.Node, size: float) -> None:
    """The output in steps of `size` times 16, which is a coarser grid than the format's."""
    value = node.outputs[0]
    uses = list(value.uses())
    step = new_constant(model, np.array(size * 16, dtype=np.float32), ir.Value(name="", type=ir.TensorType(ir.DataType.FLOAT)))
    nodes = [ir.node("Div", [value, step]), ir.node("Round", [ir.Value()]), ir.node("Mul", [ir.Value(), step])]
    nodes[1].replace_input_with(0, nodes[0].outputs[0])
    nodes[2].replace_input_with(0, nodes[1].outputs[0])
    name = value.name
    value.name = f"{name}_exact"
    for index, each in enumerate(nodes):
        each.outputs[0].name = name if index == 2 else f"{name}_coarse_{index}"
        each.outputs[0].type, each.outputs[0].shape = value.type, value.shape
        each.name = f"{node.name}_coarse_{index}"
    nodes[2].name, node.name = node.name, f"{node.name}_exact"
    model.graph.insert_after(node, nodes)
    for user, index in uses:
        user.replace_input_with(index, nodes[2].outputs[0])
    model.graph.outputs[:] = [nodes[2].outputs[0] if output is value else output for output in model.graph.outputs]


def swap_axes(model: ir.Model, node: ir.Node, size: float) -> None:
    value = weight_of(node)
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor(np.ascontiguousarray(np.swapaxes(array, -1, -2)), name=value.name)


def overflow(model: ir.Model, node: ir.Node, size: float) -> None:
    """The largest weight becomes the largest number of FP16."""
    value = weight_of(node)
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[np.unravel_index(int(np.argmax(np.abs(array.astype(np.float64)))), array.shape)] = 65504
    value.const_value = ir.tensor(array, name=value.name)


def _square(node: ir.Node) -> bool:
    value = weight_of(node)
    shape = () if value is None or value.const_value is None else tuple(value.const_value.shape.numpy())
    return len(shape) >= 2 and shape[-1] == shape[-2] > 1


FAULTS = (
    Fault(kind="weight", precisions=("fp32", "fp16"), fits=lambda node: weight_of(node) is not None, plant=change_weight),
    Fault(kind="scale of a weight", precisions=("int8",), fits=lambda node: dequantize_of(node, 1) is not None and weight_of(node) is not None, plant=change_channel),
    Fault(kind="scale of an activation", precisions=("int8",), fits=lambda node: dequantize_of(node, 0) is not None and weight_of(node) is not None, plant=change_activation),
    Fault(kind="zero point", precisions=("int8",), fits=lambda node: dequantize_of(node, 0) is not None and weight_of(node) is not None, plant=change_zero_point),
    Fault(kind="rounding", precisions=("fp32",), fits=lambda node: node.op_type in ("Conv", "Gemm", "MatMul", "Add", "Relu", "Gelu"), plant=round_output),
    Fault(kind="swapped axes", precisions=("fp32", "fp16"), fits=_square, plant=swap_axes, sized=False),
    Fault(kind="overflow", precisions=("fp16",), fits=lambda node: weight_of(node) is not None, plant=overflow, sized=False),
)  # fmt: skip


class Layers:
    """The layers of a net and of one of its files without a fault, one by one: how much a fault changes one by itself."""

    def __init__(self, fp32: Artifact, artifact: Artifact, data: Path) -> None:
        a, b = Graph.read(fp32), Graph.read(artifact)
        pairs, feed = paired(a, b), verification_feed(fp32, data).feed
        self._floors = Comparison(a, b, pairs, feed, silent)
        self._own = Comparison(b, b, pairs, feed, silent)
        self._half = bool(b.halves)
        self.tensors = {a.makers[tensor].name: tensor for tensor in reversed(pairs)}

    def sized(self, fault: Fault, name: str) -> tuple[float, float] | None:
        """The smallest size that changes what the node makes of its own input by three times its floor, and that multiple.

        None where no size does. It is the fault alone: what the file without it has of error, or in other units, does not count.
        """
        target = self.tensors[name]
        floor = self._floors.local([target])[target].floor
        _, _, feed, exact = self._own.one(target)
        scale = float(np.sqrt(np.mean(np.square(exact, dtype=np.float64)))) or 1.0

        @functools.cache
        def times(size: float) -> float:
            part = cut(self._own.b.model, [target], self._own.pairs)
            apply(part, [(fault, name, size)])
            if self._half:
                round_weights(part)
            result = CpuGraph(part)(feed)[f"{target}{LOCAL}"]
            off = np.subtract(result, exact, dtype=np.float64)
            error = float(np.sqrt(np.mean(np.square(off)))) / scale
            return (error if np.isfinite(error) else float("inf")) / max(floor, 1e-30)

        sizes = SIZES if fault.sized else [1.0]
        index = bisect.bisect_left(sizes, TIMES * math.exp(3 / math.sqrt(exact.size / 3)), key=times)
        return None if index == len(sizes) else (sizes[index], times(sizes[index]))


def round_weights(model: ir.Model) -> None:
    """To FP16, as the file holds them; the graph computes in FP32."""
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16).astype(np.float32), name=value.name)


def apply(model: ir.Model, faults: list[tuple[Fault, str, float]]) -> None:
    nodes = {node.name: node for node in model.graph}
    for fault, name, size in faults:
        fault.plant(model, nodes[name], size)


def measure(count: int, nets: list[str]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    cells = list(itertools.product(nets, ("fp32", "fp16", "int8")))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {name: make(Path(folder), name) for name in nets}
        layers = {
            (net, precision): Layers(artifacts[net]["fp32"], artifacts[net][precision], feeds_of(Path(folder), net))
            for net, precision in cells
        }
        for index in range(count):
            net, precision = cells[index % len(cells)]
            planted = draw(layers[net, precision], artifacts[net][precision], precision, 2 if index % 3 == 2 else 1, rng)
            model = load_model(artifacts[net][precision].onnx_path)
            apply(model, [(fault, name, size) for fault, name, size, _ in planted])
            file = Path(folder) / "faulty.onnx"
            save_model(model, file)
            result = verify(artifacts[net]["fp32"], file, data=feeds_of(Path(folder), net))
            names = [name for _, name, _, _ in planted]
            row = {
                "net": net,
                "precision": precision,
                "kinds": [fault.kind for fault, *_ in planted],
                "nodes": names,
                "sizes": [size for _, _, size, _ in planted],
                "times": [round(times, 2) if np.isfinite(times) else "inf" for *_, times in planted],
                "found": [layer.node for layer in result.culprits][:5],
                "right": bool(result.culprits) and result.culprits[0].node in names,
                "all": {layer.node for layer in result.culprits} == set(names),
            }
            found.append(row)
            print(index, row, file=sys.stderr, flush=True)
    return found


def draw(
    layers: Layers, artifact: Artifact, precision: str, count: int, rng: np.random.Generator
) -> list[tuple[Fault, str, float, float]]:
    """Faults in different nodes of the file, in the order of the network."""
    model = load_model(artifact.onnx_path)
    planted: list[tuple[Fault, str, float, float]] = []
    while len(planted) < count:
        kinds = [fault for fault in FAULTS if precision in fault.precisions]
        fault = kinds[rng.integers(len(kinds))]
        fitting = [node.name or "" for node in model.graph if node.name in layers.tensors and fault.fits(node)]
        if not fitting:
            continue
        name = fitting[rng.integers(len(fitting))]
        if name in {other for _, other, _, _ in planted}:
            continue
        sized = layers.sized(fault, name)
        if sized is not None:
            planted.append((fault, name, *sized))
    order = [node.name for node in model.graph]
    return sorted(planted, key=lambda each: order.index(each[1]))


def feeds_of(folder: Path, net: str) -> Path:
    """The random input that INT8 is calibrated on, and all is compared on."""
    return folder / f"{net}-feeds"


def make(folder: Path, name: str) -> dict[str, Artifact]:
    fp32 = deploy.export(folder / name, **NETS[name])
    feeds = feeds_of(folder, name)
    feeds.mkdir()
    rng = np.random.default_rng(1)
    for row in range(ROWS):
        arrays = {
            spec.name: rng.standard_normal(spec.concrete({"batch": 1})[1:], dtype=np.float32) for spec in fp32.manifest.inputs
        }
        np.savez(feeds / f"{row}.npz", **arrays)  # type: ignore[arg-type]  # names of arrays
    return {
        "fp32": fp32,
        "fp16": deploy.convert(fp32, folder / f"{name}-fp16", precision="fp16"),
        "int8": deploy.quantize(fp32, folder / f"{name}-int8", calib=feeds, cpu_form=False),
    }


def goals(document: Mapping[str, Any]) -> list[Goal]:
    found = document["faults"]
    right = sum(row["right"] for row in found)
    return [Goal(text=f"the right node first: {right} of {len(found)}, at least 95 %", met=right >= 0.95 * len(found))]


def report(document: Mapping[str, Any]) -> str:
    found = document["faults"]
    return "\n\n".join(
        (
            "# Faults that `deploy verify` finds",
            conditions_line(document["conditions"]),
            _counts("kind of fault", found, lambda row: row["kinds"]),
            _counts("network", found, lambda row: [row["net"]]),
            _counts("precision", found, lambda row: [row["precision"]]),
            bullets(goals(document)),
        )
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one network and six faults, and no file of results")
    args = parser.parse_args()
    document: dict[str, Any] = {"conditions": conditions_here()}
    document["faults"] = measure(6, ["lenet5"]) if args.quick else measure(args.faults, list(NETS))
    if args.quick:
        print(report(document))
    else:
        publish("verify-faults", document, report(document), args.results)
    return exit_status(goals(document))


def _counts(title: str, found: list[dict[str, Any]], groups: Callable[[dict[str, Any]], list[str]]) -> str:
    table = []
    for name in sorted({name for row in found for name in groups(row)}):
        rows = [row for row in found if name in groups(row)]
        table.append(
            [name, *(str(count) for count in (len(rows), sum(row["right"] for row in rows), sum(row["all"] for row in rows)))]
        )
    return markdown([title, "files", "right node first", "exactly the planted nodes"], table)


if __name__ == "__main__":
    raise SystemExit(main())

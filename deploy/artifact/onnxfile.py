"""Reads and writes ONNX files: the inputs and outputs of a graph, and a bare `.onnx` file as an artifact."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import DATA, FORMAT, FileRecord, Manifest, Precision, Source, Stage, file_digest
from deploy.artifact.onnxshapes import dim_name, infer_shapes
from deploy.artifact.tensors import Dim, TensorSpec, default_profile
from deploy.errors import ArtifactError, BackendError, UsageError
from deploy.words import did_you_mean, is_utf8

_KEEPS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose result has the numbers of their first input."""

_FLOATS: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}

SOURCE_LINE = "deploy.source"
"""The metadata of a node that says which line of the model's code it comes from: `resnet.py:92`."""

EXTERNAL_DATA_BYTES = 250_000_000
"""Weights above this size go into a file beside the graph, which is mapped into memory and not read.

A protobuf message is copied several times by whoever reads it, and cannot exceed 2 GiB.
"""

_SMALL = 1024
"""Bytes up to which a tensor is read and not mapped: shapes are computed from such constants."""

_PAGE = 4096
"""Large weights begin at a multiple of this in their file, so that they can be used where they are mapped."""

_ALIGNED: dict[str, Any] = {"alignment": _PAGE} if "alignment" in inspect.signature(ir.save).parameters else {}
"""onnx_ir before 1.1 has no such setting: it begins large weights at pages of the system."""

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.UINT16: "uint16",
    onnx.TensorProto.UINT32: "uint32",
    onnx.TensorProto.UINT64: "uint64",
    onnx.TensorProto.BOOL: "bool",
}


def open_onnx(path: Path, shapes: Mapping[str, Sequence[Dim]] | None = None) -> Artifact:
    """A bare ONNX file as an artifact whose manifest is in memory; its weights count as trained.

    shapes: see `declare_shapes`. Raises ArtifactError, and what `declare_shapes` raises.
    """
    if not path.is_file():
        raise ArtifactError(f"no file at {path}")
    if not is_utf8(path):
        raise ArtifactError(f"the path {path} is not UTF-8, and what runs it cannot open it: rename it")
    check_onnx(path)
    model = load_graph(path)
    names = [path.name, *sorted(external_files(model.graph))]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ArtifactError(f"{path} keeps its weights in {missing[0]!r}, which is not beside it")
    inferred = load_model(path)
    declare_shapes(inferred, shapes or {})
    unknown = [value.name for value in inferred.graph.inputs if value.shape is None and isinstance(value.type, ir.TensorType)]
    if unknown:
        raise ArtifactError(
            f"{path} does not say the rank of its input {unknown[0]!r}: make an artifact of it with `deploy export --onnx {path.name}"
            f" --input {unknown[0]}=SHAPE`, such as Nx3x224x224"
        )
    infer_shapes(inferred)
    inputs, outputs = model_specs(inferred)
    rows = looked_up(model.graph)
    inputs = [dataclasses.replace(spec, bounds=(0, rows[spec.name])) if spec.name in rows else spec for spec in inputs]
    files = {
        name: FileRecord(bytes=(path.parent / name).stat().st_size, sha256=file_digest(path.parent / name)) for name in names
    }
    profile = default_profile(inputs)
    precision = model_precision(inferred)
    del inferred
    manifest = Manifest(
        format=FORMAT,
        kind="onnx",
        name=path.stem,
        precision=precision,
        source=Source(factory=None, args={}, files=[], weights=None, state_dict=files[path.name].sha256, random=False),
        parent=None,
        files=files,
        inputs=inputs,
        outputs=outputs,
        profiles=[profile] if profile else [],
        preprocess=None,
        classes=None,
        parity=None,
        accuracy=None,
        calibration=None,
        exclusions=[],
        tools={},
        stage=Stage(name="onnx", request=files[path.name].sha256),
        created="",
    ).sealed()
    return Artifact(path.parent, manifest, bare=path.name)


def declare_shapes(model: ir.Model, shapes: Mapping[str, Sequence[Dim]]) -> None:
    """Record the shapes of inputs, by name, whose rank the file does not say. Raises UsageError for others."""
    inputs = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(f"the ONNX file has no input {name!r}{did_you_mean(name, inputs)}; it has {', '.join(inputs)}")
        if inputs[name].shape is not None:
            raise UsageError(f"the ONNX file says the shape of {name!r}, {inputs[name].shape}: leave `inputs` {name} out")
        inputs[name].shape = ir.Shape(shape)


def model_precision(model: ir.Model) -> Precision:
    """The precision that a graph computes in, by its weights: half where any weight is, for these decide how exact it is.

    A weight that is stored in half precision and cast to FP32 before it is used is an FP32 weight. What is quantized is FP8 where any
    code is.
    """
    codes = [node for node in model.graph.all_nodes() if node.op_type == "DequantizeLinear"]
    if codes:
        numbers = (value for node in codes for value in (*node.inputs[:1], *node.inputs[2:]) if value is not None)
        return "fp8" if any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in numbers) else "int8"
    dtypes = {dtype for graph in model.graphs() for value, rank in _weights(graph) if rank > 1 for dtype in _used_as(value)}
    if "float32" in dtypes:
        dtypes -= {"float64"}  # positions or anchors beside the weights proper
    return next((_FLOATS[dtype] for dtype in _FLOATS if dtype in dtypes), "fp32")


def _weights(graph: ir.Graph) -> Iterable[tuple[ir.Value, int]]:
    """The constants of a graph, initializers and results of Constant, with their ranks."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, len(value.const_value.shape)
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            yield node.outputs[0], len(node.attributes["value"].as_tensor().shape)


def _used_as(value: ir.Value) -> set[str]:
    """The dtypes that a constant is used in, behind the nodes that only cast or move it."""
    found: set[str] = set()
    for node, _ in value.uses():
        if node.op_type == "Cast":
            found.add(_DTYPES.get(node.attributes.get_int("to", 0), ""))
        elif node.op_type in _KEEPS:
            found |= _used_as(node.outputs[0])
        else:
            found.add(_dtype(value))
    return found if value.uses() else {_dtype(value)}


def _dtype(value: ir.Value) -> str:
    tensor = value.const_value
    return _DTYPES.get(int(tensor.dtype if tensor is not None else value.dtype or 0), "")


def load_model(path: Path) -> ir.Model:
    """The model in an ONNX file, its nodes in order, which ONNX Runtime does not ask for.

    Large external weights stay in their file, which they are mapped from: it must not change meanwhile.
    """
    model = ir.load(path)
    TopologicalSortPass()(model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (tensor.nbytes <= _SMALL or graph is not model.graph):
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
    return model


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file without its external data."""
    return onnx.load(path, load_external_data=False)


def save_model(model: ir.Model, path: Path, *, external_over: int | None = None) -> None:
    """Write `path`; weights of more than `external_over` bytes go into a file beside it. Raises OSError.

    The default limit is `EXTERNAL_DATA_BYTES`. `path` must not be what `model` was loaded from.
    """
    limit = EXTERNAL_DATA_BYTES if external_over is None else external_over
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > limit:
        ir.save(model, path, external_data=f"{path.name}{DATA}", **_ALIGNED)
    else:
        ir.save(ir.external_data.load_to_model(model), path)


def check_onnx(path: Path) -> None:
    """Raise ArtifactError if the file at `path` does not pass onnx.checker, and ONNX Runtime refuses it too."""
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf and the checker raise errors of several families
        if _runs(path):
            return
        culprit = re.search(r"Name: (.*?) OpType: (\w+)", str(error))
        node = f" (node {culprit[1]!r}, {culprit[2]})" if culprit else ""
        raise ArtifactError(f"{path} is not a valid ONNX file: {str(error).strip().splitlines()[0]}{node}") from error


def _runs(path: Path) -> bool:
    """Whether ONNX Runtime takes the file; False where it is not installed."""
    try:
        from deploy.artifact.accepted import refusal  # loads ONNX Runtime
    except BackendError:
        return False
    return not refusal(str(path))


def external_files(graph: onnx.GraphProto) -> set[str]:
    """The files with the external data, relative to the ONNX file."""
    return {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def looked_up(graph: onnx.GraphProto) -> dict[str, int]:
    """The rows of the smallest table that an integer input is an index into (Gather of weights), by its name."""
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    same = {value.name: value.name for value in graph.input if value.name not in tables}  # through operators that keep numbers
    rows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _KEEPS and node.input and node.input[0] in same:
            same[node.output[0]] = same[node.input[0]]
        elif node.op_type == "Gather" and node.input[0] in tables and node.input[1] in same:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name, size = same[node.input[1]], tables[node.input[0]][axis]
            if size:
                rows[name] = min(size, rows.get(name, size))
    return rows


def graph_specs(graph: onnx.GraphProto) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs, without initializers, and the outputs of a graph. Raises ArtifactError for one that is not a plain tensor."""
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [_spec(value) for value in graph.input if value.name not in initializers]
    return inputs, [_spec(value) for value in graph.output]


def model_specs(model: ir.Model) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs, without those that have a weight as their default, and the outputs of a graph in memory: see `graph_specs`."""
    graph = onnx.GraphProto()
    graph.input.extend(ir.serde.serialize_value(value) for value in model.graph.inputs if not value.is_initializer())
    graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs)
    return graph_specs(graph)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _DTYPES or not tensor.HasField("shape"):
        raise ArtifactError(f"{value.name!r} of the ONNX file is not a tensor of a known dtype and rank")
    shape: list[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(dim.dim_value)
        else:
            shape.append(dim_name(dim.dim_param) or f"{value.name}_{axis}")
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=tuple(shape))

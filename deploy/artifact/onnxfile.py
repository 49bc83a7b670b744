"""Reads and writes ONNX files: the inputs and outputs of a graph, and a bare `.onnx` file as an artifact."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import DATA, FORMAT, FileRecord, Manifest, Precision, Source, Stage, file_digest
from deploy.artifact.shapes import overrule
from deploy.artifact.tensors import Dim, TensorSpec, default_profile
from deploy.errors import ArtifactError

_KEEPS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose result has the numbers of their first input."""

_FLOATS: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}

EXTERNAL_DATA_BYTES = 250_000_000
"""Weights above this size go into a file beside the graph, which is mapped into memory and not read.

A protobuf message is copied several times by whoever reads it, and cannot exceed 2 GiB.
"""

_SMALL = 1024
"""Bytes up to which a tensor is read and not mapped: shapes are computed from such constants."""

_PAGE = 4096
"""Large weights begin at a multiple of this in their file, so that they can be used where they are mapped."""

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


def open_onnx(path: Path) -> Artifact:
    """A bare ONNX file as an artifact whose manifest is in memory; its weights count as trained. Raises ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"no file at {path}")
    check_onnx(path)
    model = load_graph(path)
    overrule(model)
    inputs, outputs = graph_specs(model.graph)
    rows = looked_up(model.graph)
    inputs = [dataclasses.replace(spec, bounds=(0, rows[spec.name])) if spec.name in rows else spec for spec in inputs]
    names = [path.name, *sorted(external_files(model.graph))]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ArtifactError(f"{path} keeps its weights in {missing[0]!r}, which is not beside it")
    files = {
        name: FileRecord(bytes=(path.parent / name).stat().st_size, sha256=file_digest(path.parent / name)) for name in names
    }
    profile = default_profile(inputs)
    weights = ((_DTYPES.get(tensor.data_type, ""), len(tensor.dims)) for tensor in model.graph.initializer)
    precision = _precision(weights, [node.op_type for node in model.graph.node])
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


def model_precision(model: ir.Model) -> Precision:
    """The precision that a graph computes in, by its weights: half where any weight is, for these decide how exact it is."""
    weights = (
        (_DTYPES.get(int(value.const_value.dtype), ""), len(value.const_value.shape))
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    return _precision(weights, [node.op_type for node in model.graph.all_nodes()])


def _precision(weights: Iterable[tuple[str, int]], operators: Sequence[str]) -> Precision:
    """weights: dtype and rank of each."""
    if "DequantizeLinear" in operators:
        return "int8"
    dtypes = {dtype for dtype, rank in weights if rank > 1}
    if "float32" in dtypes:
        dtypes -= {"float64"}  # positions or anchors beside the weights proper
    return next((_FLOATS[dtype] for dtype in _FLOATS if dtype in dtypes), "fp32")


def load_model(path: Path) -> ir.Model:
    """The model in an ONNX file. Large external weights stay in theirs, which they are mapped from: it must not change meanwhile."""
    model = ir.load(path)
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
        ir.save(model, path, external_data=f"{path.name}{DATA}", alignment=_PAGE)
    else:
        ir.save(ir.external_data.load_to_model(model), path)


def check_onnx(path: Path) -> None:
    """Raise ArtifactError if the file at `path` does not pass onnx.checker.

    It may leave out the shape of an output whose rank its operators tell; one whose rank nothing tells is named.
    """
    try:
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError:
            model = load_graph(path)
            if not _shapeless(model):
                raise
            overrule(model)
            if not _shapeless(model):
                onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise errors of several families
        culprit = re.search(r"Name: (.*?) OpType: (\w+)", str(error))
        node = f" (node {culprit[1]!r}, {culprit[2]})" if culprit else ""
        raise ArtifactError(f"{path} is not a valid ONNX file: {str(error).strip().splitlines()[0]}{node}") from error


def _shapeless(model: onnx.ModelProto) -> list[str]:
    """The outputs that are tensors and have no shape."""
    tensors = [value for value in model.graph.output if value.type.HasField("tensor_type")]
    return [value.name for value in tensors if not value.type.tensor_type.HasField("shape")]


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
    """The inputs and outputs of a graph in memory: see `graph_specs`."""
    graph = onnx.GraphProto()
    graph.input.extend(ir.serde.serialize_value(value) for value in model.graph.inputs)
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
            shape.append(dim.dim_param or f"{value.name}_{axis}")
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=tuple(shape))

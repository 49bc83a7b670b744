"""What a graph says of shapes, against what its operators give: a recorded shape is a note, which ONNX Runtime overrules."""

import onnx

_SMALL = 1024
"""Bytes up to which a weight may hold a shape that others are computed from."""


def overruled(model: onnx.ModelProto) -> dict[str, onnx.TensorShapeProto]:
    """By name, the shapes that the operators give to values of the main graph whose recorded shape has another rank or other sizes, or that have none.

    Empty where nothing contradicts, or where shapes cannot be inferred. `model` stays as it is; its large weights are not read.
    """
    bare = _without_shapes(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception:  # an operator that ONNX does not have, or a broken graph: others say so
        return {}
    given = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    return {
        value.name: given[value.name].shape
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.HasField("tensor_type") and value.name in given and given[value.name].HasField("shape")
        and not _agree(value.type.tensor_type, given[value.name])
    }  # fmt: skip


def overrule(model: onnx.ModelProto) -> None:
    """Record the shapes of `overruled` in `model`."""
    shapes = overruled(model)
    for value in (*model.graph.value_info, *model.graph.output):
        if value.name in shapes:
            value.type.tensor_type.shape.CopyFrom(shapes[value.name])


def _agree(recorded: onnx.TypeProto.Tensor, given: onnx.TypeProto.Tensor) -> bool:
    """Whether one has the rank of the other, and its sizes where both are numbers."""
    if not recorded.HasField("shape") or len(recorded.shape.dim) != len(given.shape.dim):
        return False
    sizes = zip(recorded.shape.dim, given.shape.dim, strict=True)
    return all(one.dim_value == other.dim_value or not (one.dim_value and other.dim_value) for one, other in sizes)


def _without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference: no recorded shapes but those of the inputs, and large weights as inputs."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    known = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for value in model.graph.output:
        graph.output.append(value)
        if value.type.HasField("tensor_type"):
            graph.output[-1].type.tensor_type.ClearField("shape")
    return bare

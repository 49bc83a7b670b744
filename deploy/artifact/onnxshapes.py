"""The dtypes and shapes in an ONNX graph, inferred anew: what a file says of them is optional, and may be stale."""

from collections.abc import Collection, Iterator, Mapping

import onnx
import onnx_ir as ir

_STANDARD = ("", "ai.onnx")

_SMALL = 1024  # bytes; the constants that shapes are computed from are smaller

_NO_NAMES = ("none", "unk", "unknown")
"""What tools write where they know no size, beside names without a letter such as `?` or `-1`."""


def slim_proto(model: ir.Model) -> onnx.ModelProto:
    """`model` serialized with its large weights turned into inputs: enough for shape inference, and never over 2 GiB."""
    slim = model.clone()
    for name, value in list(slim.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes > _SMALL:
            del slim.graph.initializers[name]
            value.type = ir.TensorType(tensor.dtype)
            value.shape = ir.Shape(tensor.shape.numpy())
            if not value.is_graph_input():
                slim.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    return ir.to_proto(slim)


def dim_name(dim: object) -> str:
    """The name of a symbolic dimension; "" where it has none, for two dimensions called `?` need not be of one size."""
    name = dim if isinstance(dim, str) else getattr(dim, "value", None)
    if not isinstance(name, str) or not any(map(str.isalpha, name)) or name.lower() in _NO_NAMES:
        return ""
    return name


def name_dims(graph: ir.Graph) -> bool:
    """Give every dimension of an input that has neither a size nor a name a name of its own; returns whether any had none.

    The third dimension of an input `x` is called `x_2`.
    """
    inputs = [value for value in graph.inputs if not value.is_initializer() and value.shape is not None]
    taken = {dim_name(dim) for value in inputs for dim in value.shape or ()}
    changed = False
    for value in inputs:
        assert value.shape is not None
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) and dim > 0:
                dims.append(dim)
                continue
            name = dim_name(dim)
            if not name:
                name = f"{value.name}_{axis}"
                while name in taken:
                    name += "_"
                taken.add(name)
            dims.append(name)
        if ir.Shape(dims) != value.shape:
            value.shape = ir.Shape(dims)
            changed = True
    return changed


def infer_shapes(model: ir.Model) -> bool:
    """Record the dtype and the shape of every value of the main graph as far as they follow from its inputs.

    Dimensions of inputs get names: see `name_dims`. What the graph declares stays where nothing else follows; once anything that it
    declares turns out to be wrong, no size that does not follow is kept. Returns whether any declaration was not kept.
    """
    changed = name_dims(model.graph)
    found = {value.name: value for value in _inferred(model)}
    names = {dim_name(dim) for value in model.graph.inputs for dim in value.shape or ()}
    values = [value for node in model.graph for value in node.outputs if value.name]
    seen = [(value, found[value.name].shape) for value in values if value.name in found]
    stale = any(_contradicts(value.shape, shape, names) for value, shape in seen)
    for value in values:
        inferred = found.get(value.name)
        if inferred is not None and inferred.type is not None and inferred.type != value.type:
            changed |= value.type is not None
            value.type = inferred.type
        shape = _merged(value.shape, inferred.shape if inferred is not None else None, names, trust=not stale)
        if shape != value.shape:
            changed |= value.shape is not None
            value.shape = shape
    return changed


def with_sizes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy of `model` whose inputs, by name, have these shapes, with what follows from them in the main graph."""
    fixed = model.clone()
    for value in fixed.graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    for node in fixed.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    infer_shapes(fixed)
    return fixed


def _inferred(model: ir.Model) -> Iterator[ir.Value]:
    """Values with what ONNX's shape inference says of them, which is told nothing but the inputs and the constants.

    onnx_ir's own pass is not used: it takes sequences for tensors.
    """
    proto = slim_proto(model)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    opaque = {name for node in proto.graph.node if _schema(node, versions) is None for name in node.output}
    declared = [info for info in proto.graph.value_info if info.name in opaque]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(declared)
    opaque |= {value.name for value in proto.graph.input}  # an input may be an output as well
    for output in proto.graph.output:
        if output.name not in opaque and output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    for node in proto.graph.node:
        _stand_in(node, versions)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # errors of several families, where an operator is used as ONNX does not define it: nothing follows then
        return
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        value = ir.Value(name=info.name)
        ir.serde.deserialize_value_info_proto(info, value)
        yield value


def _schema(node: onnx.NodeProto, versions: dict[str, int]) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain in _STANDARD else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, versions.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return None


def _stand_in(node: onnx.NodeProto, versions: dict[str, int]) -> None:
    """Turn a normalization that ONNX has no inference for into an Identity, whose result is of the same dtype and shape."""
    schema = _schema(node, versions)
    silent = schema is None or not schema.has_type_and_shape_inference_function
    if node.domain in _STANDARD and node.op_type.endswith("Normalization") and silent:
        node.op_type = "Identity"
        del node.input[1:], node.output[1:], node.attribute[:]


def _contradicts(declared: ir.Shape | None, found: ir.Shape | None, names: Collection[str]) -> bool:
    """Whether a declared shape has another rank or other sizes than follow; the names of inputs' dimensions are sizes too."""
    if declared is None or found is None:
        return False
    if len(declared) != len(found):
        return True
    return any(
        isinstance(said, int) and said > 0 and (said != seen if isinstance(seen, int) else dim_name(seen) in names)
        for said, seen in zip(declared, found, strict=True)
    )


def _merged(declared: ir.Shape | None, found: ir.Shape | None, names: Collection[str], *, trust: bool) -> ir.Shape | None:
    """What follows, and where nothing does what is declared: names always, sizes only with `trust`."""
    if declared is None or (found is not None and len(declared) != len(found)):
        known: list[object] = [None] * len(found) if found is not None else []
    else:
        known = list(declared)
    if declared is None and found is None:
        return None
    dims: list[int | str | None] = []
    for said, seen in zip(known, found if found is not None else [None] * len(known), strict=True):
        if isinstance(seen, int) or dim_name(seen) in names:
            dims.append(seen if isinstance(seen, int) else dim_name(seen))
        elif isinstance(said, int) and said > 0:
            dims.append(said if trust else None)
        else:
            dims.append(dim_name(said) or None)
    return ir.Shape(dims)

"""The pass that comes first: it brings any valid ONNX graph into the form that the other passes work on."""

import onnx
import onnx_ir as ir
from onnx_ir.passes import PassResult, common
from onnxscript import version_converter

from deploy.artifact.shapes import overruled
from deploy.errors import PrecisionError
from deploy.precision.graph import first_line, opset_version, slim_proto, unused
from deploy.precision.passes import PREPARED, VALID, PrecisionPass, opset_from

_FIRST_CONVERTIBLE = 18  # the first opset that onnxscript's version converter reads; onnx's own converts older ones


class Prepare(PrecisionPass):
    """The same computation in the form that the passes work on. Preparing a model again changes nothing.

    Local functions are inlined, Constant nodes become initializers, initializers are not inputs, and every node and value
    has a unique name (unnamed nodes are named after their operator and position, such as `Conv_3`). Dtypes and shapes of
    all values are recorded as far as they can be inferred. A graph of an older opset than `opset` is converted to `opset`.

    Raises PrecisionError when the graph is not valid ONNX or cannot be converted to `opset`.
    """

    def __init__(self, *, opset: int = 1) -> None:
        self.opset = opset
        self.leaves = (*PREPARED, opset_from(opset))

    def call(self, model: ir.Model) -> PassResult:
        imports = model.opset_imports
        imports.setdefault("", imports.pop("ai.onnx", 1))
        changed = common.InlinePass()(model).modified
        changed |= _upgrade(model, self.opset)
        changed |= _name_nodes(model)
        changed |= common.RemoveInitializersFromInputsPass()(model).modified
        changed |= common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
        changed |= common.NameFixPass()(model).modified
        if VALID.violation(model):
            changed |= _overrule_shapes(model)
        if violation := VALID.violation(model):
            raise PrecisionError(f"the graph is not valid ONNX: {violation}")
        changed |= _infer_types(model)
        return PassResult(model, changed)


def _upgrade(model: ir.Model, opset: int) -> bool:
    """Convert the graph to `opset` if it is older; returns whether it was."""
    version = opset_version(model)
    if version >= opset:
        return False
    try:
        if version < _FIRST_CONVERTIBLE:
            converted = ir.from_proto(onnx.version_converter.convert_version(slim_proto(model), _FIRST_CONVERTIBLE))
            _put_back(model.graph, converted.graph)
            model.graph, model.ir_version = converted.graph, converted.ir_version
        version_converter.convert_version(model, opset)
    except Exception as error:  # the two converters raise errors of several families
        raise PrecisionError(
            f"the graph cannot be converted from opset {version} to {opset}: {first_line(error)}; export it with opset {opset}"
        ) from error
    for node in model.graph.all_nodes():
        node.version = None
    model.ir_version = max(model.ir_version, 10)  # the first IR version for opset 22
    return True


def _put_back(original: ir.Graph, slim: ir.Graph) -> None:
    """Turn the inputs of `slim` that are large weights of `original` into these weights again."""
    for value in list(slim.inputs):
        weight = original.initializers.get(value.name or "")
        if weight is not None and value.name not in slim.initializers:
            value.const_value = weight.const_value
            slim.register_initializer(value)
            if weight not in original.inputs:
                slim.inputs.remove(value)


def _overrule_shapes(model: ir.Model) -> bool:
    """Record the shapes that the operators give where others of another rank are recorded; returns whether there were any."""
    shapes = overruled(slim_proto(model))
    values = [value for value in (out for node in model.graph for out in node.outputs) if value.name in shapes]
    for value in values:
        value.shape = ir.serde.deserialize_tensor_shape(shapes[str(value.name)])
    return bool(values)


def _infer_types(model: ir.Model) -> bool:
    """Record the dtype and shape of every value of the main graph that has neither, as far as they can be inferred.

    onnx_ir's own pass is not used: it takes sequences for tensors.
    """
    untyped = {value.name: value for node in model.graph for value in node.outputs if value.type is None and value.shape is None}
    inferred = onnx.shape_inference.infer_shapes(slim_proto(model), strict_mode=True)
    known = [info for info in inferred.graph.value_info if info.name in untyped]
    for info in known:
        ir.serde.deserialize_value_info_proto(info, untyped[info.name])
    return bool(known)


def _name_nodes(model: ir.Model) -> bool:
    """Give every node its own name; returns whether any name changed."""
    taken = {node.name for node in model.graph.all_nodes()}
    seen: set[str] = set()
    changed = False
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = unused(f"{node.name or node.op_type}_{index}", taken)
            taken.add(node.name)
            changed = True
        seen.add(node.name)
    return changed

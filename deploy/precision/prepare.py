"""The pass that comes first: it brings any valid ONNX graph into the form that the other passes work on."""

import onnx
import onnx_ir as ir
from onnx_ir.passes import PassResult, common
from onnxscript import version_converter

from deploy.artifact.onnxshapes import infer_shapes, slim_proto
from deploy.errors import PrecisionError
from deploy.precision.graph import first_line, opset_version, unused
from deploy.precision.passes import PREPARED, VALID, PrecisionPass, opset_from

_FIRST_CONVERTIBLE = 18  # the first opset that onnxscript's version converter reads; onnx's own converts older ones


_FIRST_HALF_PIXEL = 11  # Resize takes the centres of pixels from here on, unless told otherwise: the converter does not say so
_RESIZES = ("Resize", "Upsample")  # the converter makes a Resize of either
_FOREIGN = "deploy.unknown"  # where operators stay that ONNX does not have, so that the converters pass over them
_FIRST_IR = 4  # the first IR version whose initializers need not be inputs


class Prepare(PrecisionPass):
    """The same computation in the form that the passes work on. Preparing a model again changes nothing.

    Local functions are inlined, Constant nodes become initializers, initializers are not inputs and have
    users, and every node and value has a unique name (unnamed nodes are named after their operator and
    position, such as `Conv_3`). Dtypes and shapes of all values are recorded as far as they can be inferred, and declarations that
    contradict them dropped. A graph of an older opset than `opset` is converted to `opset`.

    Raises PrecisionError when the graph is not valid ONNX or cannot be converted to `opset`.
    """

    def __init__(self, *, opset: int = 1) -> None:
        self.opset = opset
        self.leaves = (*PREPARED, opset_from(opset))

    def call(self, model: ir.Model) -> PassResult:
        imports = model.opset_imports
        imports.setdefault("", imports.pop("ai.onnx", 1))
        model.ir_version = max(model.ir_version, _FIRST_IR)
        changed = common.InlinePass()(model).modified
        if opset_version(model) < self.opset:
            infer_shapes(model)  # some operators are converted by their shapes
            _upgrade(model, self.opset)
            changed = True
        changed |= _name_nodes(model)
        changed |= _tidy(model)
        changed |= common.NameFixPass()(model).modified
        if not model.graph.name:
            model.graph.name = "graph"
            changed = True
        changed |= infer_shapes(model)
        if violation := VALID.violation(model):
            raise PrecisionError(f"the graph is not valid ONNX: {violation}")
        return PassResult(model, changed)


def _tidy(model: ir.Model) -> bool:
    """Make initializers of constants, and remove initializers without a user; returns whether anything changed."""
    changed = common.RemoveInitializersFromInputsPass()(model).modified
    changed |= common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
    left = [
        name
        for name, value in model.graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    ]
    for name in left:
        del model.graph.initializers[name]
    return changed or bool(left)


def _upgrade(model: ir.Model, opset: int) -> None:
    """Convert the graph, which is older, to `opset`."""
    version = opset_version(model)
    for node in model.graph.all_nodes():
        if node.domain == "" and not onnx.defs.has(node.op_type, version, ""):  # LayerNormalization before 17, of ONNX Runtime
            node.domain = _FOREIGN
    shapes = {value.name: value.shape for value in model.graph.outputs}
    resized = [node.attributes.get_string("mode", "nearest") for node in model.graph.all_nodes() if node.op_type in _RESIZES]
    try:
        if version < _FIRST_CONVERTIBLE:
            model.opset_imports[_FOREIGN] = 1
            converted = ir.from_proto(onnx.version_converter.convert_version(slim_proto(model), _FIRST_CONVERTIBLE))
            _put_back(model.graph, converted.graph)
            model.graph, model.ir_version = converted.graph, converted.ir_version
        version_converter.convert_version(model, opset)
    except Exception as error:  # the two converters raise errors of several families
        raise PrecisionError(
            f"the graph cannot be converted from opset {version} to {opset}: {first_line(error)}; export it with opset {opset}"
        ) from error
    finally:
        model.opset_imports.pop(_FOREIGN, None)
    for node in model.graph.all_nodes():
        node.version = None
        for value in node.outputs:
            value.shape = shapes.get(value.name)  # the converter makes up names for sizes
        if node.domain == _FOREIGN:
            node.domain = ""
    if version < _FIRST_HALF_PIXEL:
        for mode, node in zip(resized, (node for node in model.graph.all_nodes() if node.op_type == "Resize"), strict=True):
            said = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            node.attributes.update({name: ir.AttrString(name, value) for name, value in said.items()})
    model.ir_version = max(model.ir_version, 10)  # the first IR version for opset 22


def _put_back(original: ir.Graph, slim: ir.Graph) -> None:
    """Turn the inputs of `slim` that are large weights of `original` into these weights again."""
    for value in list(slim.inputs):
        weight = original.initializers.get(value.name or "")
        if weight is not None and value.name not in slim.initializers:
            value.const_value = weight.const_value
            slim.register_initializer(value)
            if weight not in original.inputs:
                slim.inputs.remove(value)


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

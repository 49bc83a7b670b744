"""What the precision passes need of an ONNX graph: one canonical form, and a check of what they made of it."""

import itertools
from collections.abc import Collection

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import version_converter

from deploy.errors import PrecisionError

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""

_SMALL = 1024  # bytes; constants that shapes are computed from are smaller

_FIRST_CONVERTIBLE = 18  # onnxscript's version converter starts here; onnx's own does what is older


def prepare(model: onnx.ModelProto, *, opset: int = 1) -> onnx.ModelProto:
    """The same computation in the form that the passes work on; preparing twice changes nothing more.

    Local functions are inlined, Constant nodes become initializers, initializers are no inputs, every node and value has
    a name of its own (unnamed nodes are called after their operator and place, as `Conv_3`), and dtypes and shapes of
    all values are noted as far as they can be inferred. A graph of an older opset than `opset` is converted to it.

    Raises PrecisionError when the graph is not valid ONNX or cannot be converted to `opset`.
    """
    graph = ir.from_proto(model)
    if graph.opset_imports.setdefault("", graph.opset_imports.pop("ai.onnx", 1)) < opset:
        graph = _upgrade(model, opset)
    common.InlinePass()(graph)
    _name_nodes(graph)
    common.RemoveInitializersFromInputsPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.NameFixPass()(graph)
    check(graph, "the graph is not valid ONNX")
    prepared = ir.to_proto(graph)
    _infer_types(prepared)
    return prepared


def check(model: ir.Model, what: str) -> None:
    """Run onnx.checker with type and shape inference, whatever the size. Raises PrecisionError beginning with `what`."""
    try:
        common.CheckerPass(full_check=True)(model)
    except Exception as error:  # the checker, protobuf and shape inference raise errors of several families
        raise PrecisionError(f"{what}: {first_line(error)}") from error


def unknown_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes of the main graph whose operator neither ONNX nor the file itself defines."""
    local = {(function.domain, function.name) for function in model.functions}
    return [
        node
        for node in model.graph.node
        if (node.domain, node.op_type) not in local
        and not onnx.defs.has(node.op_type, "" if node.domain in STANDARD else node.domain)
    ]


def first_line(error: BaseException) -> str:
    """The first line of the message of the innermost error, which is the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unused(name: str, taken: Collection[str | None]) -> str:
    """`name`, with a number after it where it is taken."""
    return next(candidate for n in itertools.count(1) if (candidate := name if n == 1 else f"{name}_{n}") not in taken)


def opset_version(model: ir.Model) -> int:
    """The version of ONNX's own operators that the graph uses."""
    return model.opset_imports[""]


def _upgrade(model: onnx.ModelProto, opset: int) -> ir.Model:
    found = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 1)
    try:
        if found < _FIRST_CONVERTIBLE:
            model = onnx.version_converter.convert_version(model, _FIRST_CONVERTIBLE)
        graph = ir.from_proto(model)
        version_converter.convert_version(graph, opset)
    except Exception as error:  # the two converters raise errors of several families
        raise PrecisionError(
            f"the graph cannot be converted from opset {found} to {opset}: {first_line(error)}; export it with opset {opset}"
        ) from error
    for node in graph.graph.all_nodes():
        node.version = None
    graph.ir_version = max(graph.ir_version, 10)  # the first IR version for opset 22
    return graph


def _infer_types(model: onnx.ModelProto) -> None:
    """Note the type and shape of every value of the main graph that lacks them, as far as they can be inferred."""
    # Large weights become inputs: a message to onnx cannot exceed 2 GiB. (onnx_ir's own pass takes sequences for tensors.)
    slim = ir.from_proto(model)
    for value in list(slim.graph.initializers.values()):
        if value.const_value is not None and value.const_value.nbytes > _SMALL:
            del slim.graph.initializers[value.name or ""]
            slim.graph.inputs.append(value)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(slim), strict_mode=True)
    known = {value.name for value in model.graph.value_info}
    model.graph.value_info.extend(value for value in inferred.graph.value_info if value.name not in known)


def _name_nodes(model: ir.Model) -> None:
    taken = {node.name for node in model.graph.all_nodes()}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = unused(f"{node.name or node.op_type}_{index}", taken)
            taken.add(node.name)
        seen.add(node.name)

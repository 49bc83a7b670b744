"""TensorRT's parser: a typed ONNX file to a network, or the list of all nodes that it refuses."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.engine.bindings import Bindings
from deploy.engine.flavour import Flavour
from deploy.engine.log import make_logger, start
from deploy.errors import EngineError

if TYPE_CHECKING:
    import tensorrt


class Network:
    """An INetworkDefinition, as `definition`, with the objects that must outlive it: TensorRT's objects do not hold each other."""

    def __init__(
        self, definition: "tensorrt.INetworkDefinition", builder: "tensorrt.Builder", parser: "tensorrt.OnnxParser", log: Any
    ) -> None:
        self.definition = definition
        self.builder = builder
        self.log = log
        self._parser = parser


def parse_network(flavour: Flavour, onnx_path: Path, *, shown: str | None = None) -> Network:
    """Parse an ONNX file into a strongly typed network. `tensorrt-rtx` needs no GPU for this. shown: its name in errors.

    Raises EngineError listing every node that the parser refuses, by its ONNX name, with the reason and a remedy, and
    BackendError where TensorRT cannot start.
    """
    trt = flavour.trt
    shown = shown or str(onnx_path)
    log = make_logger(trt)
    builder = start(trt.Builder, log, f"{flavour.name} {flavour.version}")
    definition = _strongly_typed(builder, trt)
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise EngineError(_refusals(flavour, builder, parser, onnx_path, log, shown))
    return Network(definition, builder, parser, log)


def _strongly_typed(builder: "tensorrt.Builder", trt: Bindings) -> "tensorrt.INetworkDefinition":
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


_REMEDIES: Mapping[str, str] = {
    "Col2Im": "write fold as a transposed convolution, or leave it outside the model",
    "NonZero": "its output shape depends on data: use a mask of fixed shape",
    "StringNormalizer": "strings cannot run on a GPU: do this before the model",
}
_REMEDY = "replace it in the model by operators that TensorRT has, or run this model on ONNX Runtime"
_NO_PLUGIN = "Plugin not found"
"""The parser's message for an operator that it does not know: it then looks for a plugin of that name."""


def _refusals(
    flavour: Flavour, builder: "tensorrt.Builder", parser: "tensorrt.OnnxParser", onnx_path: Path, log: Any, shown: str
) -> str:
    """The message that lists every node that the parser refuses: its ONNX name, the reason and a remedy, one line each."""
    trt = flavour.trt
    network = _strongly_typed(builder, trt)
    checker = trt.OnnxParser(network, log)  # parse() stops at the first refusal; this one lists them all
    checker.supports_model_v2(onnx_path.read_bytes(), str(onnx_path))
    errors: dict[tuple[str, str], str] = {}
    for source in (parser, checker):
        for index in range(source.num_errors):
            error = source.get_error(index)
            reason = re.sub(r"^Assertion failed: .*?\): ", "", error.desc() or "")
            if reason in ("", "false"):
                reason = "the operator is not supported"
            elif _NO_PLUGIN in reason:
                domain = _domain(onnx_path, error.node_operator(), error.node_name())
                reason = f"operator {error.node_operator()} of domain {domain} is not known to {flavour.name}"
            errors.setdefault((error.node_operator(), error.node_name()), reason)
    if not any(operator for operator, _ in errors):
        return f"{flavour.name} {flavour.version} cannot parse {shown}: {next(iter(errors.values()), log.last())}"
    lines = [
        f"  {operator} {name!r}: {reason}; {_REMEDIES.get(operator, _REMEDY)}" for (operator, name), reason in errors.items()
    ]
    noun = "node" if len(lines) == 1 else "nodes"
    return "\n".join([f"{flavour.name} {flavour.version} refuses {len(lines)} {noun} of {shown}:", *lines])


def _domain(onnx_path: Path, operator: str, name: str) -> str:
    """The domain of the node that the parser refused: the parser itself reports only the operator and the name."""
    from deploy.artifact.onnxfile import load_graph  # loads onnx, which a host that rebuilds an engine need not have

    nodes = [node for node in load_graph(onnx_path).graph.node if node.op_type == operator]
    return next((node.domain for node in nodes if node.name == name or len(nodes) == 1), "") or "ai.onnx"

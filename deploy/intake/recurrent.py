"""Recurrent layers as ONNX's own operators LSTM, GRU and RNN, which are right at every length and batch.

torch.export unrolls a recurrent layer: it writes down every step of the example, which fixes the length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch.overrides import TorchFunctionMode

from deploy.errors import ExportError

# The ONNX operator, its attributes, and the gates in the order of ONNX by their places in PyTorch's weights:
# https://onnx.ai/onnx/operators/onnx__LSTM.html (i, o, f, c; PyTorch: i, f, g, o), onnx__GRU.html (z, r, h; PyTorch: r, z, n,
# with the reset gate after the product, `linear_before_reset`).
_OPERATORS: dict[Any, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    torch.lstm: ("LSTM", {}, (0, 3, 1, 2)),
    torch.gru: ("GRU", {"linear_before_reset": 1}, (1, 0, 2)),
    torch.rnn_tanh: ("RNN", {"activations": ["Tanh"]}, (0,)),
    torch.rnn_relu: ("RNN", {"activations": ["Relu"]}, (0,)),
}

_NAMES = {name for name, _, _ in _OPERATORS.values()}

_DTYPES = (torch.float32, torch.float16)
"""Those of the operators that ONNX Runtime has."""


class RecurrentLayers(TorchFunctionMode):
    """While it is active, `nn.LSTM`, `nn.GRU` and `nn.RNN` in eval mode become one ONNX operator for each of their layers.

    Raises ExportError for an LSTM with projections, for packed sequences and for other dtypes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # (input, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first): a sequence that is not packed
        if func in _OPERATORS and len(args) == 9 and isinstance(args[3], bool):
            x, state, weights, biased, layers, _, train, bidirectional, batch_first = args
            states = list(state) if isinstance(state, (tuple, list)) else [state]
            if len(states) == 2 and states[0].shape[2] != states[1].shape[2]:
                raise ExportError("ONNX has no LSTM with projections\nleave out proj_size")
            if x.dtype not in _DTYPES:
                dtype = str(x.dtype).removeprefix("torch.")
                raise ExportError(f"ONNX Runtime has no recurrent operator in {dtype}\nmake the layer float32")
            if not train:
                return _recurrent(_OPERATORS[func], x, states, weights, biased, layers, 1 + bidirectional, batch_first)
        if func is torch._pack_padded_sequence:
            raise ExportError(
                "a packed sequence is cut at lengths that only its values tell, and torch.export needs shapes"
                "\ngive the recurrent layer the padded sequence, and mask what comes behind each length"
            )
        return func(*args, **kwargs)


def _recurrent(
    operator: tuple[str, dict[str, Any], tuple[int, ...]],
    x: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biased: bool,
    layers: int,
    directions: int,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """What torch.lstm, torch.gru or torch.rnn_* returns: the sequence, and the last states of shape (layers * directions, batch, hidden).

    states: of that shape too. weights: of every layer and direction W_ih, W_hh, and with `biased` b_ih, b_hh.
    """
    name, attributes, gates = operator
    attributes = {"hidden_size": states[0].shape[2], "direction": ("forward", "bidirectional")[directions - 1], **attributes}
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * directions
    each = 4 if biased else 2
    x = x.transpose(0, 1) if batch_first else x
    last: list[list[torch.Tensor]] = [[] for _ in states]
    for layer in range(layers):
        own = [weights[each * index : each * (index + 1)] for index in range(layer * directions, (layer + 1) * directions)]
        wide = [torch.stack([_ordered(direction[part], gates) for direction in own]) for part in range(each)]
        bias = torch.cat(wide[2:], 1) if biased else None
        first = [state[layer * directions : (layer + 1) * directions] for state in states]
        sequence, *ends = torch.onnx.ops.symbolic_multi_out(
            name,
            [x, wide[0], wide[1], bias, None, *first],
            attributes,
            dtypes=[x.dtype] * (1 + len(states)),
            shapes=[(x.shape[0], directions, x.shape[1], states[0].shape[2]), *(state.shape for state in first)],
        )
        for kept, end in zip(last, ends, strict=True):
            kept.append(end)
        x = sequence.transpose(1, 2).flatten(2)
    return x.transpose(0, 1) if batch_first else x, *(torch.cat(kept) for kept in last)


def _ordered(weight: torch.Tensor, gates: Sequence[int]) -> torch.Tensor:
    rows = weight.shape[0] // len(gates)
    return torch.cat([weight[gate * rows : (gate + 1) * rows] for gate in gates])


def fold_weights(model: ir.Model) -> None:
    """Make plain initializers of the weights of recurrent operators, which the trace stacks and puts in order."""
    weights = [
        value for node in model.graph.all_nodes() if node.op_type in _NAMES for value in node.inputs[1:4] if value is not None
    ]
    nodes: set[ir.Node] = set()
    while weights:
        node = weights.pop().producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            weights += [value for value in node.inputs if value is not None]
    if nodes:
        fold_constants(model, should_fold=lambda node: node in nodes)
        RemoveUnusedNodesPass()(model)

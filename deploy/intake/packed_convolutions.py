"""Lays the weights of convolutions out for oneDNN when a package is compiled, and not at every run.

torch does so where all shapes are fixed. With a dynamic batch it leaves the weights as they are, and each run copies all of them
into the layout that oneDNN computes with.
"""

from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes


def pack_convolutions(graph: Graph) -> None:
    """Give each convolution of a frozen graph its weights in oneDNN's layout for the sizes that the graph is tuned for.

    For `post_grad_custom_pre_pass` of torch._inductor. Where oneDNN wants another layout for the sizes of a run, it still makes it
    then. Changes `graph` in place.
    """
    module = graph.owning_module
    assert module is not None
    packed: dict[Any, str] = {}  # by weight and arguments: a weight that several convolutions share is kept once
    for node in graph.find_nodes(op="call_function", target=torch.ops.mkldnn._convolution_pointwise.default):
        x, weight, _, padding, stride, dilation, groups, *_ = node.args
        if weight.op != "get_attr" or not _writes_channels_last(node):
            continue
        key = (weight.target, tuple(padding), tuple(stride), tuple(dilation), groups)
        if key not in packed:
            packed[key] = f"_packed_weight{len(packed)}"
            with torch.no_grad(), _disable_current_modes():
                values = torch.ops.mkldnn._reorder_convolution_weight(
                    attrgetter(weight.target)(module), padding, stride, dilation, groups, _tuned_for(x)
                )
            module.register_buffer(packed[key], values)
        with graph.inserting_before(node):
            replacement = graph.get_attr(packed[key])
        replacement.meta.update(weight.meta)
        node.replace_input_with(weight, replacement)
        if not weight.users:
            graph.erase_node(weight)


def _writes_channels_last(node: Node) -> bool:
    """Whether the code that torch makes for a convolution expects channels_last of it, which is what one with packed weights writes.

    Otherwise it expects NCHW: where the input is in both, for it has one channel, or one pixel. (`_prepare_convolution_fusion_create`
    in torch/_inductor/mkldnn_ir.py.) Where the output has one channel or one pixel too, both are the same.
    """
    x, y = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return not _in_both_layouts(x) or _in_both_layouts(y)


def _in_both_layouts(x: torch.Tensor) -> bool:
    _, channels, *pixels = x.shape
    return _is_one(channels) or all(map(_is_one, pixels))


def _is_one(dim: int | torch.SymInt) -> bool:
    return isinstance(dim, int) and dim == 1


def _tuned_for(x: Node) -> list[int]:
    """The shape of a value where dynamic dimensions have the sizes of the example that was traced."""
    return [dim if isinstance(dim, int) else int(dim.node.hint) for dim in x.meta["val"].shape]

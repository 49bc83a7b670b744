"""Outlier channels planted into trained nets: `plant` into a transformer, which computes nearly the same afterwards, and `plant_between` into a
net with ReLU, which computes the same.

Large transformers have channels of the residual stream at a thousand times the others, on every token (Dettmers et al. 2022,
arXiv:2208.07339; Sun et al. 2024, arXiv:2402.17762); small ones that are trained for minutes do not. Two channels of opposite
sign leave the mean that a LayerNorm takes off as it is, and outweigh all others in the deviation that it divides by, which
so becomes a constant. That is why a net that is to get them is first fine-tuned with norms of a constant deviation.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class ConstantNorm(nn.LayerNorm):
    """A LayerNorm that divides by the mean deviation of the vectors it was made from, not by that of each.

    deviation: in the unit of the input.
    """

    def __init__(self, norm: nn.LayerNorm, vectors: Tensor) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.deviation = float(vectors.std(-1, correction=0).mean())
        self.rms = float(vectors.square().mean().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.deviation * self.weight + self.bias


def norms(model: nn.Module, kind: type[nn.LayerNorm]) -> Iterator[tuple[nn.Module, str, nn.LayerNorm]]:
    """Each norm of `kind` with the module that holds it and its name there."""
    for holder in list(model.modules()):
        for name, norm in list(holder.named_children()):
            if isinstance(norm, kind):
                yield holder, name, norm


def with_constant_norms(model: nn.Module, images: Tensor) -> None:
    """Replace every LayerNorm by a ConstantNorm, in place. images: what the deviations are taken from."""
    seen: dict[nn.LayerNorm, Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]}))
        for _, _, norm in norms(model, nn.LayerNorm)
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    for holder, name, norm in norms(model, nn.LayerNorm):
        setattr(holder, name, ConstantNorm(norm, seen[norm]))


def plant(model: nn.Module, times: float, channels: tuple[int, int]) -> None:
    """Raise one channel of the residual stream of a timm ViT by `times` the others' root mean square, and lower another, in place.

    Its ConstantNorms become LayerNorms, whose outputs have the outliers too; the linear layers behind them take the constant
    that they make off their bias.
    """
    constant = [norm for _, _, norm in norms(model, ConstantNorm)]
    size = constant[0].normalized_shape[0]
    offset = torch.zeros(size)
    offset[list(channels)] = torch.tensor([1.0, -1.0]) * times * max(norm.rms for norm in constant)  # type: ignore[union-attr]
    deviation = float(offset.square().mean().sqrt())
    readers = [
        (block, name, layer) for block in model.blocks for name, layer in (("norm1", block.attn.qkv), ("norm2", block.mlp.fc1))
    ]  # type: ignore[union-attr,operator]
    with torch.no_grad():
        model.pos_embed += offset  # type: ignore[operator]
        for holder, name, linear in [*readers, (model, "norm", model.head)]:
            norm = getattr(holder, name)
            linear.bias -= linear.weight @ (offset / norm.deviation * norm.weight)  # type: ignore[operator,union-attr]
            planted = nn.LayerNorm(norm.normalized_shape, norm.eps)
            planted.load_state_dict(norm.state_dict())
            planted.weight *= deviation / norm.deviation
            setattr(holder, name, planted)


_HOMOGENEOUS = (
    nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, functional.relu, functional.max_pool2d, torch.flatten,
)  # fmt: skip
"""What multiplies its output by s where its input is multiplied by s > 0."""


def plant_between(model: nn.Module, times: float, count: int, seed: int = 0) -> list[str]:
    """Raise `count` channels between every two layers by `times`, drawn by the seed, and lower the weights that read them, in place.

    Between such layers are ReLU, pooling and flattening alone, and nothing else reads what is between. Returns the names of the layers before.
    """
    generator = np.random.default_rng(seed)
    modules = dict(model.named_modules())
    found = []
    for node in fx.symbolic_trace(model.eval()).graph.nodes:
        before = modules.get(node.target) if node.op == "call_module" else None
        after = _reader(node, modules)
        if not isinstance(before, nn.Conv2d | nn.BatchNorm2d | nn.Linear) or after is None:
            continue
        channels = before.weight.shape[0]
        factor = torch.ones(channels)
        factor[torch.from_numpy(generator.choice(channels, count, replace=False))] = times
        with torch.no_grad():
            before.weight *= factor.view(-1, *[1] * (before.weight.dim() - 1))
            if before.bias is not None:
                before.bias *= factor
            if isinstance(after, nn.Conv2d) and after.groups > 1:
                after.weight /= factor.view(-1, 1, 1, 1)
            else:  # of a flattened map, each channel has as many columns as the map has places
                columns = factor.repeat_interleave(after.weight.shape[1] // channels)
                after.weight /= columns.view(1, -1, *[1] * (after.weight.dim() - 2))
        found.append(str(node.target))
    return found


def _reader(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Conv2d | nn.Linear | None:
    """The layer that reads the output of `node`, if nothing but `_HOMOGENEOUS` is between, and nothing else reads it."""
    while len(node.users) == 1:
        (node,) = node.users
        target = modules.get(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(target, nn.Conv2d | nn.Linear):
            return target
        if not (target in _HOMOGENEOUS or type(target) in _HOMOGENEOUS):
            return None
    return None

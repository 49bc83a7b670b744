"""Fine-tuning a net of yours: weights of another net, a new head, frozen layers, new weights.

    net = torchvision.models.resnet34()
    deploy.finetune.load_weights(net, "resnet34.pth")
    deploy.finetune.replace_head(net, num_classes=10)
    deploy.finetune.freeze(net, "conv1", "bn1", "layer1")

Everything works in place, on any module. `deploy export` reads what is trained then: `torch.save(net.state_dict(), FILE)`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from deploy.errors import UsageError
from deploy.intake import fit
from deploy.intake.checkpoint import read_state_dict
from deploy.intake.fit import LoadReport
from deploy.intake.options import Match
from deploy.models.initialization import initialize_weights
from deploy.words import did_you_mean

__all__ = ["LoadReport", "freeze", "initialize_weights", "load_weights", "replace_head"]

_HEADS = ("fc", "heads", "head", "classifier")


def load_weights(
    module: nn.Module, weights: Path | str | Mapping[str, Tensor], *, match: Match = "name", allow_partial: bool = False
) -> LoadReport:
    """Copy trained weights into `module`, and return what became of every tensor. This is how `deploy export` loads them.

    weights: a file, read as `deploy export --weights` reads it (nothing in it is executed), or a state_dict.
    match: `name`, whatever prefix stands before the names; or `order`, for names that say nothing: tensors are paired by
        their order and shape, and those of the checkpoint after the module's last one are left out, so that the first layers
        of a large net go into a small one.
    allow_partial: load the tensors that fit and leave the others of the module as they are; by order, those before the first
        that does not fit.
    `LoadReport.summary()` is one line; `loaded`, `missing`, `unexpected` and `mismatched` list the tensors. Counters of
    BatchNorm (`num_batches_tracked`) are in none of them.

    Raises CheckpointError for a file that cannot be read, and for weights that do not fit; UsageError for an unknown `match`.
    """
    state = weights if isinstance(weights, Mapping) else read_state_dict(Path(weights))
    # Whether a module with other arguments would fit is not known here: how to make one is the caller's.
    return fit.load_weights(module, state, match=match, allow_partial=allow_partial, fits_with=lambda classes: False)


def replace_head(module: nn.Module, num_classes: int, name: str | None = None) -> nn.Module:
    """Replace the last linear layer or convolution by a new layer with `num_classes` outputs, and return the new layer.

    The head is searched in `fc`, `heads`, `head` and `classifier`, then in the whole module, unless `name` is given.
    The new layer has the old one's dtype, device and bias, and Xavier (linear) or Kaiming (convolution) weights.
    Raises UsageError if there is no such layer, or `num_classes` is below 1.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}
    if name is None:
        groups = [[path for path in layers if path == head or path.startswith(f"{head}.")] for head in _HEADS]
        name = next((group[-1] for group in (*groups, list(layers)) if group), None)
        if name is None:
            raise UsageError(f"{type(module).__name__} has no linear layer and no convolution to replace")
    if name not in layers:
        raise UsageError(f"{type(module).__name__} has no linear layer or convolution {name!r}{did_you_mean(name, layers)}")
    if num_classes < 1:
        raise UsageError(f"num_classes must be 1 or more, not {num_classes}")
    old = layers[name]
    like: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, **like)
    else:
        convolution: type[Any] = type(old)
        new = convolution(
            old.in_channels,
            num_classes,
            kernel_size=old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            padding_mode=old.padding_mode,
            **like,
        )
    initialize_weights(new)
    new.train(old.training)
    if name:
        module.set_submodule(name, new)
    return new


def freeze(module: nn.Module, *prefixes: str) -> None:
    """Exclude the parameters under the prefixes (`layer1`, `model.0`, ...) from training; without a prefix, all of them.

    A frozen BatchNorm stays in eval mode, even after `module.train()`, so that its running statistics do not change.
    Raises UsageError for an unknown prefix, before anything is frozen.
    """
    known = [name for name, _ in module.named_modules() if name] + [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if prefix.rstrip(".") not in known:
            raise UsageError(f"{type(module).__name__} has no module or parameter {prefix!r}{did_you_mean(prefix, known)}")
    roots = tuple(prefix.rstrip(".") for prefix in prefixes)

    def frozen(name: str) -> bool:
        return not roots or any(name == root or name.startswith(f"{root}.") for root in roots)

    for name, parameter in module.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and frozen(name):
            layer.eval()
            # On the instance, so that it survives copying and pickling and does not change the class.
            layer.train = partial(_stay_in_eval, layer)  # type: ignore[method-assign]


def _stay_in_eval(layer: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return layer

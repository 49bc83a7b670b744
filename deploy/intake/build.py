"""Builds a module from a name, loads a checkpoint into it, and rebuilds it from an artifact."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import WEIGHTS, Source, SourceFile, file_digest
from deploy.artifact.preprocess import Preprocess
from deploy.artifact.tensors import TensorSpec
from deploy.errors import ArtifactError, FactoryError, UsageError
from deploy.intake.call import by_position
from deploy.intake.checkpoint import read_state_dict
from deploy.intake.fit import LoadReport, StateDict, infer_num_classes, load_weights, mismatches
from deploy.intake.model_args import record_args, recorded_args
from deploy.intake.recipe import Recipe
from deploy.intake.reference import ReferenceRecipe
from deploy.intake.userfile import UserRecipe
from deploy.intake.weightsfile import load_saved

_NUM_CLASSES = "num_classes"
_PROBE = 1000
"""The number of classes that a factory is first called with if it needs one, to compare the module with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A module, and what is known about it.

    module: on the CPU, in eval mode.
    factory, args, source_files, folder: as the manifest's `source` records them (`args` in JSON form).
    inputs: float32; the leading 1 of every shape is the batch. None if only the user knows them.
    outputs: names in order; None if unknown.
    preprocess: the name of a preset, or the preprocessing of the library that defines the net.
    num_classes: of the head; None if unknown.
    """

    module: nn.Module
    factory: str
    args: dict[str, Any]
    source_files: tuple[SourceFile, ...]
    folder: str | None
    inputs: tuple[TensorSpec, ...] | None
    outputs: tuple[str, ...] | None
    preprocess: str | Preprocess | None
    num_classes: int | None


def build_model(
    *,
    arch: str | None = None,
    model: str | None = None,
    args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    weights: Path | None = None,
    match: Literal["name", "order"] = "name",
    allow_partial: bool = False,
    seed: int = 0,
) -> tuple[BuiltModel, LoadReport | None]:
    """Build a module and load `weights` into it. The report is None if `weights` is None.

    arch: a reference architecture, `torchvision:NAME` or `timm:NAME`; model: `FILE.py:FACTORY` or `pkg.mod:FACTORY`,
    exactly one of the two. args: the factory's keyword arguments. num_classes: passed to the factory; by default it is read
    from the head of the checkpoint. match, allow_partial: see `load_weights`. seed: of the random weights, so that they are
    always the same; the global random state does not change. Nothing is downloaded.

    Raises UsageError for an unknown architecture, for arguments that the factory does not take and when `num_classes` is
    needed, FactoryError when the module cannot be built, CheckpointError when the weights do not fit.
    """
    if (arch is None) == (model is None):
        raise UsageError("name what to build: either an architecture or a model's FILE.py:FACTORY")
    args, num_classes = _split_classes(dict(args or {}), num_classes)
    record_args(args)
    state = None if weights is None else read_state_dict(weights)
    recipe = UserRecipe(model, os.getcwd()) if model is not None else _arch_recipe(arch or "")
    if num_classes is not None and not recipe.takes_classes:
        raise UsageError(f"{recipe.factory} takes no {_NUM_CLASSES}")
    if num_classes is None and recipe.needs_classes and state is None:
        raise UsageError(f"{recipe.factory} must be given the number of classes: set `num_classes`")

    if num_classes is not None:
        args[_NUM_CLASSES] = num_classes
        module = _make(recipe, args, seed)
    else:
        module, args = _make_for(recipe, args, state, match, seed)
    if state is None:
        _fill_zero_layers(module, seed)
    report = None
    if state is not None:
        fits_with = partial(_fits_with, recipe, args, state, match, seed)
        report = load_weights(module, state, match=match, allow_partial=allow_partial, fits_with=fits_with)
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise FactoryError(f"{recipe.factory} leaves {lazy[0]!r} without a shape (a lazy layer): give its size, or `weights`")
    interface = recipe.describe(module, args)
    built = BuiltModel(
        module=module,
        factory=recipe.factory,
        args=record_args(args),
        source_files=recipe.source_files,
        folder=recipe.folder,
        inputs=interface.inputs,
        outputs=interface.outputs,
        preprocess=interface.preprocess,
        num_classes=args.get(_NUM_CLASSES, recipe.default_classes),
    )
    return built, report


def rebuild(artifact: Artifact) -> nn.Module:
    """The eager module that `artifact`, or the first of its ancestors, was exported from: on the CPU, in eval mode, by position.

    Runs the factory's code after it has compared the user's files with the digests in the manifest. Raises ArtifactError when a
    parent or the weights are missing or damaged, FactoryError when there is no module to rebuild, a file has changed or
    the factory fails, CheckpointError when the weights do not fit what it made.
    """
    root = artifact.root()
    source = root.manifest.source
    if source.factory is None:
        raise FactoryError(
            f"{root.location} came from an ONNX file: there is no eager module to rebuild; export it from the model instead"
        )
    weights = _verified_weights(root)
    _check_files(root, source)
    try:
        recipe = _recipe(source.factory, source.folder)
        module = _make(recipe, recorded_args(source.args), seed=0)
    except UsageError as error:  # not the fault of this caller: the library has changed since the export
        raise FactoryError(f"{root.location} cannot be rebuilt: {error}") from error
    recorded = {file.path for file in source.files}
    strangers = [file.path for file in recipe.source_files if file.path not in recorded]
    if strangers:
        raise FactoryError(
            f"{source.factory} now imports {strangers[0]}, which was no part of it when {root.location} was exported:"
            " remove it from the import path, or export again"
        )
    load_saved(module, weights)
    return by_position(module, [spec.name for spec in root.manifest.inputs])


def _recipe(factory: str, folder: str | None) -> Recipe:
    library, colon, _ = factory.rpartition(":")
    return UserRecipe(factory, folder) if colon and library not in ("torchvision", "timm") else _arch_recipe(factory)


def _arch_recipe(arch: str) -> Recipe:
    library, colon, name = arch.partition(":")
    if not colon:
        return ReferenceRecipe(arch)
    if library == "torchvision":  # imported here, for either library may be missing
        from deploy.intake.torchvision import TorchvisionRecipe

        return TorchvisionRecipe(name)
    if library == "timm":
        from deploy.intake.timm import TimmRecipe

        return TimmRecipe(name)
    raise UsageError(f"unknown architecture {arch!r}; expected a reference architecture, torchvision:NAME or timm:NAME"
                     f" (a factory of your own is `model` {arch})")  # fmt: skip


def _split_classes(args: dict[str, Any], num_classes: int | None) -> tuple[dict[str, Any], int | None]:
    """Takes `num_classes` out of the model arguments, where it may also be given."""
    given = args.pop(_NUM_CLASSES, None)
    if given is not None and num_classes is not None and given != num_classes:
        raise UsageError(f"`num_classes` {num_classes} and `model_args` num_classes={given} contradict one another")
    num_classes = given if num_classes is None else num_classes
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0):
        raise UsageError(f"the number of classes must be a whole number, not {num_classes!r}")
    return args, num_classes


def _make(recipe: Recipe, args: Mapping[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would seed the GPUs too
        module = recipe.build(args)
    return module.cpu().eval()


def _fill_zero_layers(module: nn.Module, seed: int) -> None:
    """Give layers whose weights are all zero until they are trained (heads of vision transformers) random ones.

    Else every output would be the same, whatever the rest computes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and _is_zero(layer.weight):
                layer.weight.normal_(0.0, layer.weight[0].numel() ** -0.5, generator=generator)


def _is_zero(weight: torch.Tensor) -> bool:
    return not is_lazy(weight) and weight.numel() > 0 and not weight.any()


def _make_for(
    recipe: Recipe, args: dict[str, Any], state: StateDict | None, match: Literal["name", "order"], seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build with the number of classes in the checkpoint: build once, compare, and build again if the number differs."""
    first = args | ({_NUM_CLASSES: _PROBE} if recipe.needs_classes else {})
    module = _make(recipe, first, seed)
    if state is None or not recipe.names_classes:
        return module, first
    classes = infer_num_classes(module, state, match)
    if not mismatches(module, state, match):
        if recipe.needs_classes and classes != _PROBE:
            raise UsageError(f"the number of classes of {recipe.factory} cannot be read from the checkpoint: set `num_classes`")
        return module, first
    if classes is not None:
        second = args | {_NUM_CLASSES: classes}
        other = _make(recipe, second, seed)
        if not mismatches(other, state, match):
            return other, second
    return module, first  # more differs than the number of classes: loading reports it


def _fits_with(
    recipe: Recipe, args: Mapping[str, Any], state: StateDict, match: Literal["name", "order"], seed: int, classes: int
) -> bool:
    """Whether the shapes in the checkpoint are those of the module that is built for so many classes."""
    if not recipe.takes_classes:
        return False
    try:
        return not mismatches(_make(recipe, {**args, _NUM_CLASSES: classes}, seed), state, match)
    except (UsageError, FactoryError):  # it takes no such number
        return False


def _verified_weights(root: Artifact) -> Path:
    record = root.manifest.files.get(WEIGHTS)
    path = root.path / WEIGHTS
    if record is None or not path.is_file():
        raise ArtifactError(f"{path} is missing: the eager module cannot be rebuilt without the weights; export again")
    if path.stat().st_size != record.bytes or file_digest(path) != record.sha256:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in the manifest; export again")
    return path


def _check_files(root: Artifact, source: Source) -> None:
    """Raise FactoryError when one of the user's files is gone or has changed since the export."""
    for file in source.files:
        path = Path(file.path)
        if not path.is_file():
            raise FactoryError(
                f"{path} (SHA-256 {file.sha256[:12]}), from which {root.location} was exported, is gone: restore it or export again"
            )
        digest = file_digest(path)
        if digest != file.sha256:
            raise FactoryError(
                f"{path} has changed since {root.location} was exported: its SHA-256 is {digest[:12]}, and {file.sha256[:12]}"
                " was exported; restore it or export again"
            )

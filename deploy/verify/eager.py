"""A's tensors as its PyTorch module computes them, in place of its ONNX file."""

import copy
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed
from deploy.errors import BackendError, UsageError
from deploy.intake.build import rebuild
from deploy.runtime.backends.eager import flatten
from deploy.runtime.session import first_line

logger = logging.getLogger(__name__)


class EagerTensors:
    """The outputs of the modules that an export was made from, under the names of the tensors of its graph.

    A module's output is the one tensor that its nodes, which are named after it, give to others. Where the exporter has folded a module
    into the one before (a batch normalization, a dropout), the tensor is what the folded one makes. Modules that are called more than once,
    or have several outputs, are left out. They are computed in double precision, and in single precision beside it, which shows what
    the order of sums does; a module that cannot run in double is run in single alone, with a warning.
    """

    def __init__(self, artifact: Artifact, model: ir.Model, feed: Feed) -> None:
        """Runs the code of the factory. Raises UsageError where the artifact has no module, BackendError where that fails, and
        what `rebuild` raises.
        """
        root = artifact.root()
        if root.manifest.source.factory is None:
            raise UsageError(f"{root.shown} was made from an ONNX file: there is no module of it to run in PyTorch")
        self._module = rebuild(root)
        self._inputs = [torch.from_numpy(feed[spec.name]) for spec in root.manifest.inputs]
        self._double: nn.Module | None = copy.deepcopy(self._module).double()
        self._outputs = [spec.name for spec in root.manifest.outputs]
        self._tensors, self._with_nodes = _tensors_of_modules(model)
        shapes = {value.name or "": value.shape for node in model.graph for value in node.outputs}
        wanted = {*self._tensors.values(), *self._outputs}
        try:
            self._run(self._double, wanted, double=True)
        except BackendError as error:
            logger.warning("the module does not run in double precision, so its own rounding is not in the floor: %s", error)
            self._double = None
        found = self._run(self._module, wanted)
        self.names = {name for name, array in found.items() if _fits(array, shapes[name])}
        """The tensors that are known."""

    def __call__(self, names: Collection[str]) -> tuple[Feed, Feed]:
        """Those of `names` that are known, float32: as computed in double precision, and in single precision."""
        single = self._run(self._module, names)
        if self._double is None:
            return single, single
        double = self._run(self._double, names, double=True)
        return {name: array.astype(single[name].dtype) for name, array in double.items()}, single

    def _run(self, module: nn.Module, names: Collection[str], *, double: bool = False) -> Feed:
        watched = _Watched(module, {part: name for part, name in self._tensors.items() if name in names}, self._with_nodes)
        try:
            with torch.inference_mode(), watched:
                given = [x.double() if double and x.is_floating_point() else x for x in self._inputs]
                results = flatten(module(*given))
        except Exception as error:  # the user's code may raise anything
            raise BackendError(f"eager failed to run the module: {type(error).__name__}: {first_line(error)}") from error
        outputs = dict(zip(self._outputs, results, strict=True))
        return watched.found | {name: result.numpy() for name, result in outputs.items() if name in names}


class _Watched:
    """Keeps the outputs of modules while the model runs.

    tensors: their names, by module. with_nodes: the modules that have nodes in the graph; others are folded into the one before.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, str], with_nodes: Collection[str]) -> None:
        self._parts = {part: name for name, part in model.named_modules() if name}
        self._tensors, self._with_nodes = tensors, with_nodes
        self._made: Any = WeakIdKeyDictionary()
        self._calls: Counter[str] = Counter()
        self.found: Feed = {}

    def __enter__(self) -> None:
        self._handles = [part.register_forward_hook(self._leave) for part in self._parts]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for part, name in self._tensors.items():
            if self._calls[part] > 1:
                self.found.pop(name, None)

    def _leave(self, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name = self._parts[part]
        self._calls[name] += 1
        if not isinstance(output, torch.Tensor):
            return
        tensor = self._tensors.get(name)
        if name not in self._with_nodes and len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
            tensor = self._made.get(inputs[0]) if inputs[0].shape == output.shape else None
        if tensor is not None:
            self._made[output] = tensor
            self.found[tensor] = output.numpy().copy()


def _tensors_of_modules(model: ir.Model) -> tuple[dict[str, str], set[str]]:
    """The tensor that each module gives to others, where it is one; and all modules that have nodes."""
    leaving: dict[str, list[str]] = {}
    for node in model.graph:
        for module in _modules_of(node):
            for value in node.outputs:
                readers = [reader for reader, _ in value.uses()]
                if value.name and (value.is_graph_output() or any(module not in _modules_of(reader) for reader in readers)):
                    leaving.setdefault(module, []).append(value.name)
    modules = {module for node in model.graph for module in _modules_of(node)}
    return {module: names[0] for module, names in leaving.items() if len(names) == 1}, modules


def _modules_of(node: ir.Node) -> list[str]:
    """`layer1.0.conv1`, `layer1.0` and `layer1` of the node `layer1.0.conv1/Conv`."""
    parts = (node.name or "").rpartition("/")[0].split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1) if parts[0]]


def _fits(array: np.ndarray, shape: ir.Shape | None) -> bool:
    dims = None if shape is None else list(shape)
    return dims is None or (
        len(dims) == array.ndim
        and all(not isinstance(dim, int) or dim == size for dim, size in zip(dims, array.shape, strict=True))
    )

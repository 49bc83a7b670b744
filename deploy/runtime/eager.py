"""The module itself in plain PyTorch: what everything else is measured against.

It runs the code of the model's factory, so it is used only when named. An artifact derived from another runs the
module of the export that it descends from, in FP32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.session import Session, SessionOptions, closed_error, first_line

try:
    import torch

    from deploy.factory import rebuild
except ImportError as error:
    raise BackendError(f"torch cannot be imported ({error}); install it with: pip install torch") from error


class EagerSession(Session):
    """`inputs` and `outputs` are those of the export. The module is called with its inputs by position."""

    backend = "eager"
    native = "torch"
    devices = ("cpu", "cuda")

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options, device=_device(options.device))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        root = artifact.root()
        self._describe(root.manifest)
        module = rebuild(root).to(self.device)
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._module: Any = self._prepare(module)

    def _prepare(self, module: torch.nn.Module) -> Any:
        """What is called in the module's stead."""
        return module

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        module = self._module
        if module is None:
            raise closed_error(self.name)
        inputs = [feed[name] for name in self._input_names]
        try:
            with torch.inference_mode():
                results = _flatten(self._call(module, inputs))
        except Exception as error:  # the user's code may raise anything
            raise BackendError(
                f"{self.backend} failed to run {self.name!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if len(results) != len(self._output_names):
            raise BackendError(
                f"{self.name!r} returned {len(results)} tensors; the manifest lists {', '.join(map(str, self.outputs))}"
            )
        # The caller may write to what comes back: nothing that is an input, a weight or a buffer is handed out.
        kept = self._memory | {x.untyped_storage().data_ptr() for x in inputs}
        return [x.clone() if x.untyped_storage().data_ptr() in kept else x for x in results]

    def _call(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        return module(*inputs)

    def _release(self) -> None:
        self._module = None


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise BackendError(
                f"no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} usable CUDA devices"
            )
    return device


def _flatten(value: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _flatten(part)]
    if value is None:
        return []
    raise TypeError(f"the module returned a {type(value).__name__}; expected tensors, or tuples, lists or dicts of them")


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return EagerSession(artifact, options)

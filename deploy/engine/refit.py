"""The weights of an engine that was built without: they are put in when it is loaded, from its typed ONNX file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.engine.bindings import Bindings
from deploy.errors import BackendError

if TYPE_CHECKING:
    import tensorrt

_LISTED = 5


def refit(engine: "tensorrt.ICudaEngine", trt: Bindings, onnx_path: Path, log: Any, what: str) -> None:
    """Put the weights in the ONNX file at `onnx_path` into `engine`, which nothing runs yet. what: the engine, for errors.

    Raises BackendError if the engine takes no weights, or others than the file has.
    """
    try:
        refitter = trt.Refitter(engine, log)
        parser: Any = trt.OnnxParserRefitter(refitter, log)  # the stubs take its bool for a TensorRT type
    except TypeError as error:  # what the bindings raise for a null pointer
        raise BackendError(f"{what} takes no weights: {log.last()}") from error
    if not parser.refit_from_file(str(onnx_path)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BackendError(f"{what} does not take the weights of {onnx_path.name}: {'; '.join(reasons) or log.last()}")
    if missing := list(refitter.get_missing_weights()):
        raise BackendError(f"{onnx_path.name} lacks weights that {what} needs: {', '.join(missing[:_LISTED])}")
    if not refitter.refit_cuda_engine():
        raise BackendError(f"{what} does not take the weights of {onnx_path.name}: {log.last()}")

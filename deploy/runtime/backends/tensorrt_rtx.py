"""TensorRT-RTX engines."""

from collections.abc import Sequence

from deploy.artifact.artifact import Artifact
from deploy.engine.flavour import load_flavour
from deploy.runtime.backends.tensorrt import TensorRTSession
from deploy.runtime.session import Session, SessionOptions


class TensorRTRTXSession(TensorRTSession):
    backend = "tensorrt-rtx"


def version(variant: Sequence[str]) -> str:
    """The version of TensorRT-RTX. Raises BackendError if it is not installed."""
    return load_flavour(TensorRTRTXSession.backend).version


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTRTXSession(artifact, options)

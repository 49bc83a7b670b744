"""TensorRT-RTX engines."""

from deploy.artifact.artifact import Artifact
from deploy.runtime.backends.tensorrt import TensorRTSession
from deploy.runtime.session import Session, SessionOptions


class TensorRTRTXSession(TensorRTSession):
    backend = "tensorrt-rtx"


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTRTXSession(artifact, options)

"""TensorRT-RTX engines."""

from deploy.artifact import Artifact
from deploy.runtime.session import Session, SessionOptions
from deploy.runtime.tensorrt import TensorRTSession


class TensorRTRTXSession(TensorRTSession):
    backend = "tensorrt-rtx"


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return TensorRTRTXSession(artifact, options)

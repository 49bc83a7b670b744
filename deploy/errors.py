"""Every error that `deploy` raises on purpose.

    DeployError
    ├── UsageError          an option, a name or a combination of them that cannot be meant (exit status 2)
    ├── OutputError         the output cannot be written where it was asked for
    ├── ArtifactError       an artifact that is missing, damaged, edited or of another format
    ├── CheckpointError     a checkpoint that cannot be read, or does not fit the module
    ├── FactoryError        a model factory that cannot be found, imported or called
    ├── UserCodeError       a function of the user's in an artifact that cannot be imported, fails or returns what does not fit
    ├── ExportError         a module that the ONNX exporter cannot handle
    ├── PrecisionError      a graph that a precision pass cannot convert
    ├── ParityError         outputs further from the reference than the tolerance allows
    ├── AccuracyError       more accuracy lost than the gate allows
    ├── EngineError         a graph that TensorRT refuses, or an engine that did not honour the request
    ├── DataError           images or folders that cannot be used
    ├── BackendError        a backend that is not installed, or cannot run this artifact here
    ├── ModelNotFoundError  a model or version that a server does not have
    ├── UnavailableError    a model that is not loaded, or a server that is on its way down
    └── SessionError        a session used wrongly
        ├── InputError      names, dtypes or shapes other than those that the session takes
        ├── QueueFullError  more requests wait than may
        ├── DeadlineError   a request that was not begun in the time it had
        └── SessionClosedError

A message is one or two lines: what, where, what was expected, what to do. An error of another library is wrapped
with `from`, so that `--debug` shows it.
"""


class DeployError(Exception):
    """Base of all errors raised on purpose. `exit_status` is what the command line ends with."""

    exit_status = 1


class UsageError(DeployError):
    """An option, a name or a combination of them that cannot be meant."""

    exit_status = 2


class OutputError(DeployError):
    """The output cannot be written where it was asked for: not ours to replace, no room, no permission."""


class ArtifactError(DeployError):
    """An artifact that is missing, damaged, edited by hand or of another format."""


class CheckpointError(DeployError):
    """A checkpoint that cannot be read safely, or whose tensors do not fit the module."""


class FactoryError(DeployError):
    """A model factory that cannot be found, imported or called."""


class UserCodeError(DeployError):
    """A function of the user's in an artifact that cannot be imported, fails, or returns what does not fit."""


class ExportError(DeployError):
    """A module that the ONNX exporter cannot handle."""


class PrecisionError(DeployError):
    """A graph that a precision pass cannot convert."""


class ParityError(DeployError):
    """Outputs further from the reference than the tolerance allows."""


class AccuracyError(DeployError):
    """More accuracy lost than the gate allows."""


class EngineError(DeployError):
    """A graph that TensorRT refuses, or an engine that did not honour the request."""


class DataError(DeployError):
    """Images or folders that cannot be used."""


class BackendError(DeployError):
    """A backend that is not installed, or cannot run this artifact on this machine."""


class ModelNotFoundError(DeployError):
    """A model or version that a server does not have."""


class UnavailableError(DeployError):
    """A model that is not loaded, or a server on its way down: try again later, or elsewhere."""


class SessionError(DeployError):
    """A session used wrongly."""


class InputError(SessionError):
    """Names, dtypes or shapes other than those that the session takes."""


class QueueFullError(SessionError):
    """More requests wait for a session than may: try again later."""


class DeadlineError(SessionError):
    """A request that was not begun within the time that it had."""


class SessionClosedError(SessionError):
    """A session used after `close()`."""


class WorkerDiedError(BackendError):
    """A worker process that ended before it replied; the message ends with its last lines on standard error."""


class RefusedError(DeployError):
    """A request that is refused before anything is done with it. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

"""What the server says of itself: metadata, configuration, statistics, and the status of an error."""

from deploy.errors import (
    DataError,
    DeadlineError,
    InputError,
    ModelNotFoundError,
    QueueFullError,
    RefusedError,
    UnavailableError,
    UsageError,
)

EXTENSIONS = (
    "binary_tensor_data", "classify_image", "metrics", "model_configuration", "model_repository", "model_repository(unload_dependents)",
    "parameters", "schedule_policy", "statistics",
)  # fmt: skip


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, ModelNotFoundError):
        return 404
    if isinstance(error, InputError | UsageError | DataError):
        return 400
    if isinstance(error, QueueFullError | UnavailableError | DeadlineError):
        return 503
    return 500

"""Errors: one base, and the exit statuses of the command line."""

import inspect

import pytest

from deploy import errors

ALL = [each for _, each in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_a_deploy_error_and_wrong_usage_alone_ends_with_2(error: type[errors.DeployError]) -> None:
    assert issubclass(error, errors.DeployError)
    assert error.exit_status == (2 if issubclass(error, errors.UsageError) else 1)
    assert error.__doc__


def test_a_refused_request_has_the_status_of_http() -> None:
    error = errors.RefusedError(413, "too large")
    assert (error.status, str(error)) == (413, "too large")


def test_what_went_wrong_with_a_session_is_caught_as_one() -> None:
    for kind in (errors.InputError, errors.QueueFullError, errors.DeadlineError, errors.SessionClosedError):
        assert issubclass(kind, errors.SessionError)
    assert issubclass(errors.WorkerDiedError, errors.BackendError)

"""Options of `deploy serve` that do not fit together, and the options of Ray."""

from collections.abc import Callable
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact


def test_an_option_that_is_refused_is_named_as_the_command_line_spells_it(
    shared_lenet5: Artifact, run: Callable[..., Any]
) -> None:
    for arguments, message in (
        (["--body-timeout", "-1"], "--body-timeout must be more than 0, not -1.0"),
        (["--stop-delay", "-1"], "--stop-delay must be 0 or more, not -1"),
        (["--drain-timeout", "-1"], "--drain-timeout must be 0 or more, not -1"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 opens the server to other machines: give it a token (--token-file)"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key go together"),
        (["--ray", "--max-replicas", "0"], "--max-replicas 0 must not be less than --replicas 1"),
    ):
        done = run("serve", shared_lenet5.path, *arguments)
        assert done.status == 2
        assert message in done.err


@pytest.mark.parametrize("arguments", [["--replicas", "2"], ["--detach"], ["--replica-gpus", "1"]])
def test_options_of_ray_need_ray(arguments: list[str], shared_lenet5: Artifact, run: Callable[..., Any]) -> None:
    finished = run("serve", shared_lenet5.path, *arguments)
    assert finished.status == 2
    assert f"{arguments[0]} needs --ray" in finished.err


def test_the_grpc_door_needs_a_token(shared_lenet5: Artifact, run: Callable[..., Any]) -> None:
    finished = run("serve", shared_lenet5.path, "--grpc-port", 8001, "--ray")
    assert finished.status == 2
    assert "Ray opens the gRPC door to other machines, whatever --host is: give it a token (--token-file)" in finished.err


@pytest.mark.parametrize("arguments", [["--ray", "ARTIFACT"], ["ARTIFACT", "--ray", "ARTIFACT"]])
def test_an_artifact_is_not_taken_for_an_address(arguments: list[str], shared_lenet5: Artifact, run: Callable[..., Any]) -> None:
    finished = run("serve", *[text.replace("ARTIFACT", str(shared_lenet5.path)) for text in arguments])
    assert finished.status == 2
    assert "put --ray behind the artifacts" in finished.err

"""Who may call what."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.errors import RefusedError, UsageError
from deploy.serving.grpc_messages import message
from deploy.serving.guard import Access, is_loopback, read_token

from .conftest import ADMIN, INFER, LOAD, TOKEN, Server, body, call


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/v2/health/live", None, 200), ("/v2/health/ready", None, 200), ("/v2", None, 401), ("/metrics", None, 401),
        (INFER, None, 401), (INFER, "wrong", 401), (INFER, TOKEN, 200), (INFER, ADMIN, 200), (LOAD, TOKEN, 401), (LOAD, ADMIN, 200),
        ("/v2/repository/index", TOKEN, 401), ("/v2/repository/index", ADMIN, 200),
    ],
)  # fmt: skip
def test_who_may_call_what(closed: Server, path: str, token: str | None, status: int) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = body() if path == INFER else b"" if "repository" in path else None
    answered, document, answered_headers = call(closed, path, data, headers)
    assert answered == status
    if status == 401:
        assert "token" in document["error"]
        assert answered_headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in json.dumps(document)


def test_the_grpc_door_has_the_same_locks(closed: Server) -> None:

    with grpc.insecure_channel(closed.grpc) as channel:

        def ask(method: str, token: str | None) -> Any:
            rpc = channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}", request_serializer=lambda request: request.SerializeToString()
            )
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            try:
                rpc(message(f"inference.{method}Request")(), metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert ask("ServerLive", None) == grpc.StatusCode.OK
        assert ask("ServerMetadata", None) == grpc.StatusCode.UNAUTHENTICATED
        assert ask("ServerMetadata", TOKEN) == grpc.StatusCode.OK
        assert ask("RepositoryIndex", TOKEN) == grpc.StatusCode.UNAUTHENTICATED
        assert ask("RepositoryIndex", ADMIN) == grpc.StatusCode.OK


def test_web_pages_cannot_reach_a_server_of_this_machine(limited: Server) -> None:
    status, document, _ = call(limited, INFER, body(), {"Host": "evil.example"})
    assert (status, "localhost" in document["error"]) == (403, True)
    status, document, _ = call(limited, LOAD, b"", {"Origin": "https://evil.example"})
    assert (status, "web pages" in document["error"]) == (403, True)


def test_admin_calls_of_an_open_server_need_a_token_of_their_own() -> None:
    for access in (Access(loopback=False), Access(token=TOKEN)):
        with pytest.raises(RefusedError, match="--admin-token-file"):
            access.check({"authorization": f"Bearer {TOKEN}"}, admin=True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("", False), ("localhost.evil.com", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_token_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(UsageError, match="cannot read"):
        read_token(file)
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.write_text("short")
    with pytest.raises(UsageError, match="16 characters or more"):
        read_token(file)

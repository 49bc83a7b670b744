"""The options of a server, and those that do not fit together."""

from pathlib import Path
from typing import Any

import pytest

from deploy.errors import UsageError
from deploy.serving.guard import Limits
from deploy.serving.options import RayOptions, ServerOptions

from .conftest import TOKEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "opens the server to other machines: give it a token"),
        ({"tls_cert": Path("x")}, "go together"),
        ({"http_port": 70000}, "between 0 and 65535"),
        ({"http_port": None, "grpc_port": None}, "both doors are shut"),
    ],
)
def test_options_that_leave_the_server_open_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**options)
    assert ServerOptions(host="0.0.0.0", token=TOKEN)
    assert ServerOptions(host="0.0.0.0", insecure=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "1 or more"),
        ({"replicas": 3, "max_replicas": 2}, "`max_replicas` 2 must not be less than `replicas` 3"),
        ({"replicas_per_node": 0}, "1 or more"),
        ({"target_requests": 0.0}, "more than 0"),
        ({"replica_gpus": -1.0}, "0 or more"),
        ({"detach": True}, "`detach` needs the address of a cluster"),
        ({"address": "/"}, "is a path, not the address"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RayOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["stop_delay_s", "drain_s"])
def test_times_are_not_negative(name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}` must be 0 or more, not -1"):
        ServerOptions(**{name: -1.0})


@pytest.mark.parametrize("name", ["request_bytes", "image_pixels", "body_s"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}` must be more than 0, not 0"):
        Limits(**{name: 0})

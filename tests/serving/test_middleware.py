"""The frame of every request over REST: ids, methods and paths, and errors with what a client may do about them."""

import threading
import urllib.request
from collections.abc import Callable

from deploy.artifact.artifact import Artifact

from .conftest import INFER, Server, body, call


def test_wrong_methods_and_paths_are_answered_as_the_protocol_wants(limited: Server) -> None:
    for path, data, status in (("/v2/models/digits/infer", None, 405), ("/v3", None, 404), ("/v2/health/live", b"", 405)):
        answered, document, headers = call(limited, path, data)
        assert answered == status
        assert document["error"]
        assert headers["X-Request-Id"]
    assert call(limited, "/v2", None, {"X-Request-Id": "abc-1"})[2]["X-Request-Id"] == "abc-1"
    assert call(limited, "/v2", None, {"X-Request-Id": "a b"})[2]["X-Request-Id"] != "a b"


def test_a_full_queue_says_when_to_come_again(shared_lenet5: Artifact, serve: Callable[..., Server]) -> None:
    server = serve(f"digits={shared_lenet5.path}", "--queue", "4", "--max-batch", "4", "--delay-ms", "400")
    statuses: list[int] = []
    retry: list[str] = []

    def client() -> None:
        status, _, headers = call(server, INFER, body(3))
        statuses.append(status)
        if status == 503:
            retry.append(headers["Retry-After"])

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(statuses) == {200, 503}
    assert set(retry) == {"1"}
    with urllib.request.urlopen(f"http://{server.http}/metrics") as answer:
        text = answer.read().decode()
    assert f'nv_inference_request_failure{{model="digits",version="1",reason="REJECTED"}} {len(retry)}\n' in text

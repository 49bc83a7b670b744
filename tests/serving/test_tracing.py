"""Traces of requests, in the SDK's own memory: the caller's trace goes on, and the stages follow one another."""

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deploy.artifact.artifact import Artifact
from deploy.serving.grpc_door import GrpcDoor
from deploy.serving.grpc_messages import message
from deploy.serving.models import ModelOptions, Models
from deploy.serving.options import ServerOptions
from deploy.serving.rest_door import HttpDoor
from deploy.serving.source import ModelSource
from deploy.serving.tracing import Tracing

from .conftest import INFER, body

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture(scope="module")
def models(shared_lenet5: Artifact) -> Iterator[Models]:
    made = Models([ModelSource(name="digits", path=shared_lenet5.path)], ModelOptions(warmup=False))
    made.load_all()
    yield made
    made.close()


def spans(models: Models, kind: Any, talk: Any) -> dict[str, ReadableSpan]:
    """The spans that `talk`, called with the address of a door, leaves behind, by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main() -> None:
        options = ServerOptions(http_port=0, grpc_port=0)
        door = await kind.open(models, options, trace=Tracing(provider))
        try:
            await asyncio.to_thread(talk, door.address.rpartition("//")[2])
        finally:
            await door.close()

    asyncio.run(main())
    found = exporter.get_finished_spans()
    assert len({span.name for span in found}) == len(found)
    return {span.name: span for span in found}


def rest(address: str, content: bytes = body()) -> None:
    request = urllib.request.Request(f"http://{address}{INFER}", content, CONTEXT)
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


def unary(address: str) -> None:
    request = message("inference.ModelInferRequest")(model_name="digits", id="7")
    request.inputs.add(name="input", datatype="FP32", shape=[1, 1, 28, 28])
    request.raw_input_contents.append(np.zeros((1, 1, 28, 28), np.float32).tobytes())
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        call(request.SerializeToString(), metadata=tuple(CONTEXT.items()), timeout=30)


@pytest.mark.parametrize(("kind", "talk"), [(HttpDoor, rest), (GrpcDoor, unary)])
def test_a_request_continues_its_callers_trace_and_has_its_stages(models: Models, kind: Any, talk: Any) -> None:
    found = spans(models, kind, talk)
    assert sorted(found) == ["answer", "compute", "decode", "infer digits", "queue"]
    whole = found["infer digits"]
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    assert whole.attributes["deploy.version"] == "1"
    assert whole.attributes.get("deploy.request_id", "7") == "7"
    at = whole.start_time
    for name in ("decode", "queue", "compute", "answer"):
        span = found[name]
        assert (span.parent.span_id, span.context.trace_id) == (whole.context.span_id, whole.context.trace_id)
        assert at <= span.start_time <= span.end_time <= whole.end_time
        at = span.end_time
    assert whole.status.is_unset


def test_a_request_that_is_refused_ends_where_it_was_refused(models: Models) -> None:
    found = spans(models, HttpDoor, lambda address: rest(address, b"{}"))
    assert sorted(found) == ["decode", "infer digits"]
    assert found["infer digits"].attributes["error.type"] == "InputError"
    assert found["infer digits"].status.is_unset, "the fault is the caller's"


def test_what_a_client_writes_into_its_trace_is_not_logged(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    def talk(address: str) -> None:
        headers = {**CONTEXT, "tracestate": "x" * 1000}
        urllib.request.urlopen(urllib.request.Request(f"http://{address}{INFER}", body(), headers), timeout=30).close()

    assert f"{next(iter(spans(models, HttpDoor, talk).values())).context.trace_id:032x}" == TRACE
    assert "xxxx" not in caplog.text


def test_a_server_without_the_option_loads_nothing_of_it() -> None:
    from deploy.serving.server import tracing

    assert tracing(ServerOptions()) is None


def test_a_name_of_the_environment_goes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.serving.tracing import _resource

    assert _resource().attributes["service.name"] == "deploy"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vision")
    assert _resource().attributes["service.name"] == "vision"

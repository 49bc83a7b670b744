"""Traces of inference requests by OpenTelemetry: a span of the request, and in it decode, queue, compute and answer.

A trace that the caller has begun is continued (W3C Trace Context, the header `traceparent`). Where the spans go, and how many of them, is
set by OpenTelemetry's own environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deploy.errors import DeployError
from deploy.serving.answers import status_of
from deploy.serving.stages import Stages
from deploy.version import __version__

_FLUSH_S = 3.0


class Tracing:
    """Makes spans of finished requests. provider: None for one that sends them by OTLP over HTTP."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        if provider is None:
            provider = TracerProvider(resource=_resource())
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._provider = provider
        self._tracer = provider.get_tracer("deploy", __version__)
        self._propagator = TraceContextTextMapPropagator()
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)  # it warns of what clients send, and repeats it

    def __call__(self, headers: Mapping[str, str], stages: Stages, error: BaseException | None) -> None:
        """The spans of one request that has just been answered, or failed with `error`."""
        end = time.perf_counter()
        offset = time.time_ns() - round(end * 1e9)

        def at(seconds: float) -> int:
            return round(seconds * 1e9) + offset

        attributes: dict[str, Any] = {"deploy.model": stages.model, "deploy.version": stages.version}
        if stages.request_id:
            attributes["deploy.request_id"] = stages.request_id
        span = self._tracer.start_span(
            f"infer {stages.model}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=at(stages.began),
        )
        inside = set_span_in_context(span)

        def stage(name: str, start: float, stop: float) -> None:
            self._tracer.start_span(name, context=inside, start_time=at(start)).end(at(stop))

        stage("decode", stages.began, stages.decoded or end)
        if stages.ran is not None:
            stage("queue", stages.ran.came, stages.ran.began)
            stage("compute", stages.ran.began, stages.ran.ran)
            stage("answer", stages.ran.ran, end)
        if error is not None:
            # Only what the client reads too: a message of another library may say more than a trace should.
            text = str(error) if isinstance(error, DeployError) else type(error).__name__
            is_ours = not isinstance(error, Exception) or status_of(error) >= 500
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, text) if is_ours else Status(StatusCode.UNSET))
        span.end(at(end))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_FLUSH_S)


def _resource() -> Resource:
    """The variable OTEL_SERVICE_NAME goes before our name."""
    found = Resource.create()
    return found if "OTEL_SERVICE_NAME" in os.environ else found.merge(Resource({"service.name": "deploy"}))

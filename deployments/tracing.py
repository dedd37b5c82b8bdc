"""ASGI middleware: an OpenTelemetry span for every request that is traced, the parent of vLLM's and of the layer calls.

vLLM has set up the exporter (otlp_traces_endpoint); who is sampled is decided by OpenTelemetry's SDK, by the request's
own traceparent header if it has one (deployments/environment.py).
"""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.trace_ids import with_span

_PREFIX = "/v1/"
_ID_HEADER = "x-request-id"


class Traced:
    """Spans for the requests to /v1/ of `app`: method, path, status, when the answer began; no word of it."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import trace

        self._app = app
        self._tracer = trace.get_tracer("switchyard.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _PREFIX not in scope["path"]:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation import tracecontext

        propagator = tracecontext.TraceContextTextMapPropagator()
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}",
            context=propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            carrier: dict[str, str] = {}
            propagator.inject(carrier)
            for name in propagator.fields:
                del headers[name]
            headers.update(carrier)
            context = span.get_span_context()
            if context.trace_flags.sampled:
                headers[_ID_HEADER] = with_span(headers.get(_ID_HEADER, ""), context.trace_id, context.span_id)
            is_first = True

            async def observed(message: Message) -> None:
                nonlocal is_first
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                elif message.get("body") and is_first:
                    is_first = False
                    span.add_event("the answer begins")
                await send(message)

            await self._app(scope, receive, observed)

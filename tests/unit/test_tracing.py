"""A traced request's span is the parent of what vLLM does with it and of its layer calls; the others cost nothing."""

import asyncio

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

from cluster.calls import Counters
from cluster.config import parse_settings
from cluster.errors import ConfigError
from cluster.trace_ids import span_in, with_span
from deployments.environment import engine_environment
from deployments.tracing import Traced
from model.layer_spans import LayerSpans

TRACE, SPAN = 0xABC << 100, 0xDEF
PARENT = f"00-{TRACE:032x}-{SPAN:016x}-01"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exported: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return provider


def test_a_request_s_id_carries_its_span():
    for before in ("", "mine", "cmpl-5"):
        marked = with_span(before, TRACE, SPAN)
        assert marked.startswith(before)
        assert span_in(f"cmpl-{marked}-0-1a2b3c4d") == (TRACE, SPAN)
    for other in ("", "cmpl-5", "cmpl-trace-12", "x-trace-" + "g" * 48):
        assert span_in(other) is None


def ask(provider: TracerProvider, monkeypatch, path: str, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """The headers that the app behind the middleware sees."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 418, "headers": []})
        for body in (b"a secret", b" word"):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def send(_message):
        pass

    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    asyncio.run(Traced(app)(scope, None, send))
    return seen


def test_a_traced_request_goes_on_with_its_span(provider, exported, monkeypatch):
    headers = {"traceparent": PARENT, "x-request-id": "mine", "accept": "x"}
    seen = dict(ask(provider, monkeypatch, "/v1/completions", headers))
    (span,) = exported.get_finished_spans()
    assert span.parent.span_id == SPAN and span.context.trace_id == TRACE
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 418,
    }
    assert [event.name for event in span.events] == ["the answer begins"]
    assert "secret" not in span.to_json()
    assert seen[b"traceparent"].decode() == f"00-{TRACE:032x}-{span.context.span_id:016x}-01"
    assert seen[b"x-request-id"].startswith(b"mine")
    assert span_in(seen[b"x-request-id"].decode()) == (TRACE, span.context.span_id)
    assert seen[b"accept"] == b"x"


def test_one_that_is_not_goes_on_as_not_traced(provider, exported, monkeypatch):
    seen = dict(ask(provider, monkeypatch, "/v1/completions", {"x-request-id": "mine"}))
    assert seen[b"x-request-id"] == b"mine"
    assert (
        not int(seen[b"traceparent"][-2:], 16) & 1
    )  # not sampled; without the header vLLM would begin a trace of its own
    assert ask(provider, monkeypatch, "/metrics", {"traceparent": PARENT}) == [(b"traceparent", PARENT.encode())]
    assert exported.get_finished_spans() == ()


def test_layer_calls_of_traced_requests_have_spans_in_the_first_step_and_some_later_ones(provider, exported):
    ids = ["cmpl-1-0", f"cmpl-{with_span('', TRACE, SPAN)}-0"]
    spans = LayerSpans(lambda: ids, provider.get_tracer("t"))
    counters = Counters()
    for step in range(33):
        for layer in range(2):
            spans.begin(layer, 5, counters)
            counters.wait_ns += 2_000_000 + step
            counters.messages += 3
            spans.end(counters)
    found = exported.get_finished_spans()
    assert [span.attributes["switchyard.layer"] for span in found] == [0, 1] * 3  # steps 1, 16 and 32
    assert {(span.context.trace_id, span.parent.span_id) for span in found} == {(TRACE, SPAN)}
    first = found[0].attributes
    assert (first["switchyard.tokens"], first["switchyard.requests"]) == (5, 2)
    assert (first["switchyard.wait_us"], first["switchyard.messages"], first["switchyard.resent"]) == (2000, 3, 0)
    assert found[0].start_time <= found[0].end_time


def test_without_a_traced_request_there_are_none(provider, exported):
    spans = LayerSpans(lambda: ["cmpl-1-0"], provider.get_tracer("t"))
    for _ in range(20):
        spans.begin(0, 1, Counters())
        spans.end(Counters())
    assert exported.get_finished_spans() == ()


def test_many_traced_requests_in_a_step_are_bounded(provider, exported):
    ids = [with_span("", TRACE, number) for number in range(1, 100)]
    spans = LayerSpans(lambda: ids, provider.get_tracer("t"))
    spans.begin(0, 1, Counters())
    spans.end(Counters())
    assert len(exported.get_finished_spans()) == 8


def test_tracing_is_off_unless_a_collector_is_named():
    assert not any(name.startswith("OTEL") for name in engine_environment(parse_settings({"model": "m"}), (0,)))
    on = {"endpoint": "http://c:4318/v1/traces", "protocol": "http", "sample": 0.5}
    environment = engine_environment(parse_settings({"model": "m", "tracing": on}), (0,))
    assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert environment["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    with pytest.raises(ConfigError, match=r"tracing\.sample: is 2, must be 1 or less"):
        parse_settings({"model": "m", "tracing": {"sample": 2}})

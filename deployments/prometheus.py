"""Metrics as text for Prometheus: our readings, and vLLM's families of every engine with that engine's id as label."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.catalogue import Kind
from cluster.histogram import BOUNDS_S
from cluster.readings import Reading, readings
from deployments.http_guard import send_error

PATH = "/metrics"
_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
_BOUNDS = (*map(repr, BOUNDS_S), "+Inf")

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""Name, help, type, samples (name, labels, value): a metric family as plain JSON types."""


def families_of(collector: Any) -> list[Family]:
    """What a prometheus_client registry holds, without the _created series that nobody asks for."""
    return [
        (
            family.name,
            family.documentation,
            family.type,
            [(s.name, dict(s.labels), s.value) for s in family.samples if not s.name.endswith("_created")],
        )
        for family in collector.collect()
    ]


def exposition(snapshot: Mapping[str, Any]) -> bytes:
    """The text of one scrape, of a snapshot as cluster/readings.py describes it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector([*_own(readings(snapshot)), *_passed_on(snapshot["engines"])]))
    text: bytes = generate_latest(registry)
    return text


class _Collector:
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _own(found: Iterable[Reading]) -> Iterator[Metric]:
    families: dict[str, Any] = {}
    for reading in found:
        metric = reading.metric
        family = families.get(metric.name)
        if family is None:
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            families[metric.name] = family
        if isinstance(reading.value, Mapping):
            buckets = list(zip(_BOUNDS, reading.value["counts"], strict=True))
            family.add_metric(reading.labels, buckets, reading.value["sum_s"])
        else:
            family.add_metric(reading.labels, reading.value)
    yield from families.values()


def _passed_on(engines: Mapping[str, Any]) -> Iterator[Metric]:
    families: dict[str, Metric] = {}
    for engine_id, engine in engines.items():
        for name, text, kind, samples in engine["families"]:
            family = families.setdefault(name, Metric(name, text, kind))
            for sample, labels, value in samples:
                family.add_sample(sample, {**labels, "engine": engine_id}, value)
    yield from families.values()


class ClusterMetrics:
    """ASGI middleware: /metrics is answered with the whole cluster's, or 404 while snapshot() is None: switched off."""

    def __init__(self, app: ASGIApp, snapshot: Callable[[], Awaitable[Mapping[str, Any] | None]]) -> None:
        self._app = app
        self._snapshot = snapshot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != scope.get("root_path", "") + PATH:
            await self._app(scope, receive, send)
            return
        snapshot = await self._snapshot()
        if snapshot is None:
            await send_error(send, HTTPStatus.NOT_FOUND, "Metrics are switched off (metrics: false).")
            return
        # In a thread: the text of a large cluster takes long enough to hold up tokens that are being streamed.
        text = await asyncio.to_thread(exposition, snapshot)
        headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": HTTPStatus.OK.value, "headers": headers})
        await send({"type": "http.response.body", "body": text})

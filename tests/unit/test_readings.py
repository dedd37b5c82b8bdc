"""From real counters to the text that Prometheus reads, without Ray: a dispatcher, a worker, a registry."""

import asyncio
import contextlib
import json

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from cluster import histogram
from cluster.catalogue import OURS
from cluster.dispatcher import Dispatcher
from cluster.expert_load import ExpertLoad
from cluster.fakes import ThreadWorker, ToyShape, eventually
from cluster.outages import Outages
from cluster.placement import partition
from cluster.readings import readings
from cluster.registry import Registry
from cluster.telemetry import Telemetry
from deployments.prometheus import ClusterMetrics, exposition, families_of

SHAPE = ToyShape()
SHARDS = partition(SHAPE.num_layers, SHAPE.num_experts, 2)
NO_ENERGY = {"nvml": None, "rapl": None}


@pytest.fixture(scope="module")
def snapshot():
    """Of two workers and one engine that has made seven calls of five tokens."""
    with contextlib.ExitStack() as stack:
        workers = [ThreadWorker(SHAPE, shard) for shard in SHARDS]
        dispatcher = Dispatcher(
            engine_id="engine-0", secret=SHAPE.secret, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
            max_tokens=SHAPE.max_tokens, expert_timeout_s=20.0,
        )  # fmt: skip
        for thing in (*workers, dispatcher):
            stack.callback(thing.close)
        table = SHAPE.table(1, SHARDS, [worker.replica(f"r{i}") for i, worker in enumerate(workers)])
        dispatcher.update(table)
        x_TD, weights_TK = torch.ones(5, SHAPE.hidden), torch.ones(5, SHAPE.top_k)
        ids_TK = torch.tensor([[0, SHAPE.num_experts - 1]] * 5, dtype=torch.int32)
        for _ in range(7):
            dispatcher.finish(dispatcher.start(1, x_TD, weights_TK, ids_TK), torch.empty_like(x_TD))
        assert eventually(lambda: all(w.server.metrics()["counters"]["computed_messages"] == 7 for w in workers))
        yield snapshot_of(table, workers, dispatcher)


def snapshot_of(table, workers, dispatcher):
    registry, experts = Registry(table, 5.0, {0: 1, 1: 1}, 0.0, 0.0), ExpertLoad(table)
    telemetry = Telemetry(experts)
    energy = {"nvml": None, "rapl": 1.5}
    for replica, worker in zip(table.replicas, workers, strict=True):
        registry.register(replica, table.model_fingerprint, 1000, 0.0)
        metrics = {**worker.server.metrics(), "energy": energy, "rejected": {"bad_magic": 2}}
        telemetry.worker_reports(replica.replica_id, json.loads(json.dumps(metrics)))
        experts.report(replica, worker.server.load()["expert_tokens"])
    telemetry.engine_reports("engine-0", 1, {"ranks": [dispatcher.metrics()], "families": [], "energy": NO_ENERGY})
    return {
        "version": "1",
        "model": "toy",
        "status": registry.status(1.0),
        "events": dict(registry.events.counts),
        "outages": {0: (2, 1.5)},
        "silent_engines": 0,
        **telemetry.to_json(),
    }


def samples_of(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_scrape_has_every_metric_of_the_catalogue_and_the_right_figures(snapshot):
    samples = samples_of(exposition(snapshot))
    names = {name for name, _ in samples}
    assert {series for metric in OURS for series in metric.series} <= names
    assert value(samples, "switchyard_layer_calls_total", engine="engine-0") == 7
    assert value(samples, "switchyard_layer_call_tokens_total", engine="engine-0") == 35
    assert value(samples, "switchyard_messages_total", engine="engine-0") == 14
    for name, count in (("dispatch", 7), ("wait", 7), ("combine", 7), ("wire", 14), ("failover_stall", 0)):
        assert value(samples, f"switchyard_{name}_seconds_count", engine="engine-0") == count, name
    for shard in "01":
        assert value(samples, "switchyard_worker_tokens_total", shard=shard, replica=f"r{shard}") == 35
        assert value(samples, "switchyard_worker_queue_seconds_count", shard=shard, replica=f"r{shard}") == 7
    assert value(samples, "switchyard_expert_tokens_total", layer="1", expert="0") == 35
    assert value(samples, "switchyard_expert_tokens_total", layer="1", expert="1") == 0
    assert value(samples, "switchyard_shard_outage_seconds_total", shard="0") == 1.5
    assert value(samples, "switchyard_energy_joules_total", kind="worker", id="r0", source="rapl") == 1.5
    assert value(samples, "switchyard_energy_measured", kind="worker", id="r0", source="nvml") == 0
    assert value(samples, "switchyard_replicas", shard="1", state="online") == 1


def test_bytes_are_those_of_the_wire_on_both_ends(snapshot):
    samples = samples_of(exposition(snapshot))
    sent = 64 + 5 * (SHAPE.hidden * 4 + SHAPE.top_k * 8)
    received = 64 + 5 * SHAPE.hidden * 4
    for direction, num_bytes, other in (("sent", sent, "received"), ("received", received, "sent")):
        assert value(samples, "switchyard_bytes_total", engine="engine-0", direction=direction) == 14 * num_bytes
        by_workers = [
            value(samples, "switchyard_worker_bytes_total", shard=s, replica=f"r{s}", direction=other) for s in "01"
        ]
        assert sum(by_workers) == 14 * num_bytes


def test_without_a_router_an_engine_shows_itself(snapshot):
    alone = {"version": "1", "model": "toy", "engines": snapshot["engines"]}
    assert {name for name, _ in samples_of(exposition(alone))}.isdisjoint({"switchyard_router_up"})
    lost = samples_of(exposition({**alone, "status": None}))
    assert (
        value(lost, "switchyard_router_up") == 0 and value(lost, "switchyard_layer_calls_total", engine="engine-0") == 7
    )


def test_ranks_of_an_engine_are_added_up(snapshot):
    engine = snapshot["engines"]["engine-0"]
    two = {**snapshot, "engines": {"engine-0": {**engine, "ranks": engine["ranks"] * 2}}}
    samples = samples_of(exposition(two))
    assert value(samples, "switchyard_layer_calls_total", engine="engine-0") == 14
    assert value(samples, "switchyard_dispatch_seconds_bucket", engine="engine-0", le="+Inf") == 14


def test_families_of_several_engines_become_one_with_an_engine_label(snapshot):
    def families(count: int):
        registry = CollectorRegistry()
        Counter("vllm:generation_tokens", "Tokens.", ["engine"], registry=registry).labels("0").inc(count)
        Histogram("vllm:time", "Time.", ["engine"], registry=registry).labels("0").observe(1)
        return json.loads(json.dumps(families_of(registry)))

    engines = {name: {"ranks": [], "families": families(n), "energy": NO_ENERGY} for name, n in (("a", 3), ("b", 4))}
    text = exposition({"version": "1", "model": "toy", "engines": engines})
    assert text.count(b"# TYPE vllm:generation_tokens_total counter") == 1 and b"_created" not in text
    samples = samples_of(text)
    assert [value(samples, "vllm:generation_tokens_total", engine=name) for name in "ab"] == [3, 4]


def test_labels_are_complete_and_series_unique(snapshot):
    found = list(readings(snapshot))
    assert len({(reading.metric.name, reading.labels) for reading in found}) == len(found)


def test_whoever_is_gone_is_not_scraped_any_more():
    telemetry = Telemetry(ExpertLoad(SHAPE.table(1, SHARDS, [])))
    for name in ("r0", "r1"):
        telemetry.worker_reports(name, {"counters": {}})
    telemetry.engine_reports("engine-0", 1, {})
    telemetry.keep({"r1"}, ())
    assert set(telemetry.to_json()["workers"]) == {"r1"} and not telemetry.to_json()["engines"]


def test_scrapes_close_together_share_the_engines_answers():
    telemetry = Telemetry(ExpertLoad(SHAPE.table(1, SHARDS, [])))
    first = telemetry.begin_scrape(0.0)
    assert telemetry.begin_scrape(0.4) == first and telemetry.begin_scrape(0.6) == first + 1
    telemetry.engine_reports("a", first, {})
    assert telemetry.silent(first, ["a"]) == [] and telemetry.silent(first + 1, ["a", "b"]) == ["a", "b"]


def test_outages_add_up_and_the_present_one_counts():
    outages = Outages()
    outages.begin(3, 10.0)
    assert outages.totals(12.0) == {3: (1, 2.0)}
    outages.end(3, 15.0)
    outages.begin(3, 100.0)
    assert outages.totals(101.0) == {3: (2, 6.0)}


def test_histogram_buckets_are_cumulative_and_bounded():
    times = histogram.Histogram()
    for ns in (0, 1, 20_000, 1_000_000_000, 1 << 62):
        times.note(ns)
    counts = times.to_json()["counts"]
    assert counts[-1] == 5 and counts == sorted(counts) and len(counts) == len(histogram.BOUNDS_S) + 1
    for ns in (20_000, 1_000_000_000):
        at = next(i for i, bound_s in enumerate(histogram.BOUNDS_S) if ns / 1e9 < bound_s)
        assert counts[at] - (counts[at - 1] if at else 2) == 1
    assert histogram.add([times.to_json(), times.to_json()])["counts"][-1] == 10


@pytest.mark.parametrize(("path", "status"), [("/metrics", 200), ("/metrics/", 200), ("/v1/models", 204)])
def test_only_its_path_is_taken(snapshot, path, status):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def give():
        return snapshot

    async def send(message):
        sent.append(message)

    asyncio.run(ClusterMetrics(app, give)({"type": "http", "path": path}, None, send))
    assert sent[0]["status"] == status


def test_metrics_that_are_off_are_404():
    sent = []

    async def nothing():
        return None

    async def send(message):
        sent.append(message)

    asyncio.run(ClusterMetrics(None, nothing)({"type": "http", "path": "/metrics"}, None, send))
    assert sent[0]["status"] == 404 and b"metrics: false" in sent[1]["body"]

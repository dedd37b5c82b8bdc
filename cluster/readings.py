"""From the router's snapshot of the cluster to readings of the catalogue's metrics. Pure.

A snapshot has {"version", "model", "status": Registry.status(), "events": {kind: n}, "outages": {shard: [n, seconds]},
"silent_engines": n} and what Telemetry.to_json() has. Of a dense model, which has no router, there is "version",
"model" and "engines" only; when the router does not answer, also "status": None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster import histogram
from cluster.blame import OVERLOADED, Cause
from cluster.catalogue import BY_NAME, Kind, Metric
from cluster.routing import ReplicaState

_RETRIES = {
    "lost": "lost",
    "draining": "refused_draining",
    "expired": "expired",
    "failed": "errors",
    "not_finite": "not_finite",
    "resplit": "resplit",
}
_ENGINE_COUNTERS = {
    "switchyard_layer_calls_total": "calls",
    "switchyard_layer_call_tokens_total": "tokens",
    "switchyard_messages_total": "messages",
    "switchyard_hedges_won_total": "hedge_wins",
    "switchyard_timeouts_total": "timeouts",
}
_ENGINE_TIMES = {
    "switchyard_dispatch_seconds": "dispatch",
    "switchyard_wait_seconds": "wait",
    "switchyard_wire_seconds": "wire",
    "switchyard_combine_seconds": "combine",
    "switchyard_failover_stall_seconds": "stall",
}
_WORKER_COUNTERS = {
    "switchyard_worker_tokens_total": "computed_tokens",
    "switchyard_worker_messages_total": "computed_messages",
    "switchyard_worker_kernel_calls_total": "kernel_calls",
}
_WORKER_TIMES = {"switchyard_worker_compute_seconds": "compute", "switchyard_worker_queue_seconds": "queue"}
_CAUSES = (*(cause.value for cause in Cause), OVERLOADED)
_STATUSES = ("ok", "error", "expired", "draining")
_SPARE_STATES = ("ready", "adopting", "serving", "released")
_ENGINE_STATES = ("starting", "ready", "stalled")


@dataclass(frozen=True)
class Reading:
    """One series' value: a number, or a Histogram.to_json()."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Mapping[str, Any]


def readings(snapshot: Mapping[str, Any]) -> Iterator[Reading]:
    """Every reading of our own metrics."""
    yield _reading("switchyard_info", 1, snapshot["version"], snapshot["model"])
    if "status" in snapshot:
        yield _reading("switchyard_router_up", int(snapshot["status"] is not None))
    if status := snapshot.get("status"):
        yield from _router(snapshot, status)
        yield from _workers(snapshot, status)
    for engine_id, engine in snapshot["engines"].items():
        yield from _energy("engine", engine_id, engine["energy"])
        if engine["ranks"]:
            yield from _engine(engine_id, engine["ranks"])


def _reading(name: str, value: float | Mapping[str, Any], *labels: object) -> Reading:
    metric = BY_NAME[name]
    assert len(labels) == len(metric.labels) and (metric.kind is Kind.HISTOGRAM) == isinstance(value, Mapping), name
    return Reading(metric, tuple(map(str, labels)), value)


def _router(snapshot: Mapping[str, Any], status: Mapping[str, Any]) -> Iterator[Reading]:
    yield _reading("switchyard_routing_epoch", status["epoch"])
    yield _reading("switchyard_shards_missing", len(status["missing_shards"]))
    yield _reading("switchyard_engines_silent", snapshot["silent_engines"])
    for shard in status["shards"]:
        yield _reading("switchyard_replicas_wanted", shard["wanted"], shard["id"])
        states = Counter(replica["state"] for replica in shard["replicas"])
        for state in ReplicaState:
            yield _reading("switchyard_replicas", states[state.value], shard["id"], state.value)
        outages, seconds = snapshot["outages"].get(shard["id"], (0, 0.0))
        yield _reading("switchyard_shard_outages_total", outages, shard["id"])
        yield _reading("switchyard_shard_outage_seconds_total", seconds, shard["id"])
    for name, known in (("spares", _SPARE_STATES), ("engines", _ENGINE_STATES)):
        states = Counter(each["state"] for each in status[name])
        for word in known:
            yield _reading(f"switchyard_{name}", states[word], word)
    for kind, count in sorted(snapshot["events"].items()):
        yield _reading("switchyard_events_total", count, kind)
    for layers, expert, tokens in snapshot["expert_tokens"]:
        yield _reading("switchyard_expert_tokens_total", tokens, layers, expert)


def _workers(snapshot: Mapping[str, Any], status: Mapping[str, Any]) -> Iterator[Reading]:
    for shard in status["shards"]:
        for replica in shard["replicas"]:
            labels = (shard["id"], replica["id"])
            yield _reading("switchyard_worker_memory_bytes", replica["memory_bytes"], *labels)
            yield _reading("switchyard_worker_waiting_messages", replica["load"].get("waiting", 0), *labels)
            if replica["id"] in snapshot["workers"]:
                yield from _worker(snapshot["workers"][replica["id"]], *labels)


def _worker(metrics: Mapping[str, Any], shard: int, replica: str) -> Iterator[Reading]:
    counters = metrics["counters"]
    for name, counter in _WORKER_COUNTERS.items():
        yield _reading(name, counters[counter], shard, replica)
    for name, times in _WORKER_TIMES.items():
        yield _reading(name, metrics["seconds"][times], shard, replica)
    yield _reading("switchyard_worker_oldest_wait_seconds", metrics["oldest_wait_s"], shard, replica)
    for status in _STATUSES:
        yield _reading("switchyard_worker_replies_total", counters[status], shard, replica, status)
    for direction in ("sent", "received"):
        yield _reading("switchyard_worker_bytes_total", metrics[f"bytes_{direction}"], shard, replica, direction)
    for reason, count in sorted(metrics["rejected"].items()):
        yield _reading("switchyard_worker_rejected_total", count, shard, replica, reason)
    yield from _energy("worker", replica, metrics["energy"])


def _engine(engine: str, ranks: list[Mapping[str, Any]]) -> Iterator[Reading]:
    """Of all its tensor-parallel ranks together, each of which dispatches a share of the tokens."""
    counters: Counter[str] = Counter()
    accusations: Counter[str] = Counter()
    for rank in ranks:
        counters.update(rank["counters"])
        accusations.update(rank["accusations"])
    yield _reading("switchyard_engine_epoch", min(rank["epoch"] for rank in ranks), engine)
    for name, counter in _ENGINE_COUNTERS.items():
        yield _reading(name, counters[counter], engine)
    for name, times in _ENGINE_TIMES.items():
        yield _reading(name, histogram.add([rank["seconds"][times] for rank in ranks]), engine)
    for direction in ("sent", "received"):
        yield _reading("switchyard_bytes_total", sum(rank[f"bytes_{direction}"] for rank in ranks), engine, direction)
    for reason, counter in _RETRIES.items():
        yield _reading("switchyard_retries_total", counters[counter], engine, reason)
    yield _reading("switchyard_hedges_total", counters["hedged"], engine, "silent")
    for cause in _CAUSES:
        yield _reading("switchyard_accusations_total", accusations[cause], engine, cause)


def _energy(kind: str, name: str, joules: Mapping[str, float | None]) -> Iterator[Reading]:
    """None is a source that cannot be read there."""
    for source, value in joules.items():
        yield _reading("switchyard_energy_measured", int(value is not None), kind, name, source)
        if value is not None:
            yield _reading("switchyard_energy_joules_total", value, kind, name, source)

"""Every metric that Switchyard promises: name, kind, unit, labels and meaning, once.

What is served at /metrics (deployments/prometheus.py), ops/metrics.md, the dashboards and the alert rules are made from
this list. Names are as in a query. A counter's name ends in _total; a histogram has _bucket, _sum and _count series.

How many series there can be is bounded: labels hold ids of living processes, of shards, of layers (or ranges of layers)
and experts, or words from fixed lists. Nothing that a request brings along is ever a label.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric. `is_ours` is False for vLLM's own, which are passed on with the engine's id as their engine label."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    is_ours: bool = True

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which it can be queried."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)


MAX_EXPERT_SERIES = 2048
"""Of switchyard_expert_tokens_total; where layers x experts are more, neighbouring layers share a series."""

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_SHARD, _WORKER, _ENGINE = ("shard",), ("shard", "replica"), ("engine",)
_VLLM = ("model_name", "engine")


def _vllm(name: str, kind: Kind, unit: str, text: str, *more: str) -> Metric:
    return Metric(f"vllm:{name}", kind, unit, (*_VLLM, *more), text, is_ours=False)


METRICS: tuple[Metric, ...] = (
    # -- the expert router's view -----------------------------------------------------------------------------------
    Metric("switchyard_info", _G, "", ("version", "model"), "Always 1; says what is running."),
    Metric("switchyard_router_up", _G, "", (), "1 if the expert router has answered this scrape, else 0."),
    Metric("switchyard_routing_epoch", _G, "", (), "Number of the expert router's routing table."),
    Metric("switchyard_replicas", _G, "replicas", ("shard", "state"), "Replicas of a shard in each state."),
    Metric("switchyard_replicas_wanted", _G, "replicas", _SHARD, "Replicas that a shard shall have."),
    Metric("switchyard_shards_missing", _G, "shards", (), "Shards without a worker that is online."),
    Metric("switchyard_spares", _G, "spares", ("state",), "Warm spares in each state."),
    Metric("switchyard_engines", _G, "engines", ("state",), "Engines in each state: starting, ready, stalled."),
    Metric("switchyard_engines_silent", _G, "engines", (), "Engines that did not answer this scrape in time."),
    Metric("switchyard_events_total", _C, "events", ("kind",), "What `switchyard events` lists, by kind."),
    Metric("switchyard_shard_outages_total", _C, "outages", _SHARD, "Times that a shard has lost its last worker."),
    Metric(
        "switchyard_shard_outage_seconds_total",
        _C,
        "seconds",
        _SHARD,
        "Time that a shard was without a worker, so far.",
    ),
    Metric(
        "switchyard_expert_tokens_total",
        _C,
        "tokens",
        ("layer", "expert"),
        "Tokens that were gated to an expert, over all its replicas, dead ones included.",
    ),
    # -- workers ----------------------------------------------------------------------------------------------------
    Metric("switchyard_worker_tokens_total", _C, "tokens", _WORKER, "Tokens computed."),
    Metric("switchyard_worker_messages_total", _C, "messages", _WORKER, "Layer calls computed, one for each engine's."),
    Metric("switchyard_worker_kernel_calls_total", _C, "calls", _WORKER, "Kernel calls; each takes all that waits."),
    Metric("switchyard_worker_compute_seconds", _H, "seconds", _WORKER, "Duration of kernel calls."),
    Metric("switchyard_worker_queue_seconds", _H, "seconds", _WORKER, "Time from a message's arrival to its kernel."),
    Metric("switchyard_worker_waiting_messages", _G, "messages", _WORKER, "Messages that wait for the kernel now."),
    Metric("switchyard_worker_oldest_wait_seconds", _G, "seconds", _WORKER, "Age of the message that waits longest."),
    Metric("switchyard_worker_replies_total", _C, "replies", (*_WORKER, "status"), "Replies, by status on the wire."),
    Metric(
        "switchyard_worker_bytes_total",
        _C,
        "bytes",
        (*_WORKER, "direction"),
        "Bytes of computed calls: received and sent, through shared memory or TCP, without padding.",
    ),
    Metric(
        "switchyard_worker_rejected_total",
        _C,
        "connections",
        (*_WORKER, "reason"),
        "Connections closed for what their bytes were, by error class.",
    ),
    Metric("switchyard_worker_memory_bytes", _G, "bytes", _WORKER, "Memory that the experts take."),
    # -- dispatchers, one in each engine (summed over its ranks) ----------------------------------------------------
    Metric("switchyard_engine_epoch", _G, "", _ENGINE, "Number of the routing table that the engine uses."),
    Metric("switchyard_layer_calls_total", _C, "calls", _ENGINE, "MoE layer calls."),
    Metric("switchyard_layer_call_tokens_total", _C, "tokens", _ENGINE, "Tokens in those calls."),
    Metric("switchyard_messages_total", _C, "messages", _ENGINE, "Messages sent to workers, with those sent again."),
    Metric(
        "switchyard_bytes_total",
        _C,
        "bytes",
        (*_ENGINE, "direction"),
        "Bytes sent to and received from workers, through shared memory or TCP, without padding.",
    ),
    Metric("switchyard_dispatch_seconds", _H, "seconds", _ENGINE, "Per call: grouping, copying, sending."),
    Metric("switchyard_wait_seconds", _H, "seconds", _ENGINE, "Per call: waiting for the workers' answers."),
    Metric(
        "switchyard_wire_seconds",
        _H,
        "seconds",
        _ENGINE,
        "Per message: round trip without the worker's queue and kernel.",
    ),
    Metric("switchyard_combine_seconds", _H, "seconds", _ENGINE, "Per call: adding up the workers' answers."),
    Metric(
        "switchyard_retries_total",
        _C,
        "messages",
        (*_ENGINE, "reason"),
        "Messages whose work was sent again: lost (connection broke), draining, expired, failed (kernel raised), "
        "not_finite, resplit (shards have changed).",
    ),
    Metric(
        "switchyard_hedges_total",
        _C,
        "messages",
        (*_ENGINE, "reason"),
        "Messages sent to a second replica while the first is asked still: silent is the only reason.",
    ),
    Metric("switchyard_hedges_won_total", _C, "messages", _ENGINE, "Of those, the ones the second answered first."),
    Metric(
        "switchyard_accusations_total", _C, "accusations", (*_ENGINE, "cause"), "Suspicions of workers, by their cause."
    ),
    Metric("switchyard_timeouts_total", _C, "calls", _ENGINE, "Times that a call had waited for expert_timeout_s."),
    Metric(
        "switchyard_failover_stall_seconds",
        _H,
        "seconds",
        _ENGINE,
        "Calls that needed another replica, or waited for one: time from there to their end. _count is the failovers.",
    ),
    # -- energy -----------------------------------------------------------------------------------------------------
    Metric(
        "switchyard_energy_joules_total",
        _C,
        "joules",
        ("kind", "id", "source"),
        "Energy of an engine or worker: nvml, its GPUs; rapl, its host's packages and memory by its share of CPU time.",
    ),
    Metric(
        "switchyard_energy_measured",
        _G,
        "",
        ("kind", "id", "source"),
        "1 where that source can be read; 0: not measured.",
    ),
    # -- vLLM's, those that we rely on; all others are passed on too ------------------------------------------------
    _vllm("kv_cache_usage_perc", _G, "1", "KV cache in use, 0 to 1."),
    _vllm("num_requests_running", _G, "requests", "Requests that are computed."),
    _vllm("num_requests_waiting", _G, "requests", "Requests in the queue."),
    _vllm("prompt_tokens_total", _C, "tokens", "Prompt tokens computed."),
    _vllm("generation_tokens_total", _C, "tokens", "Tokens generated."),
    _vllm("num_preemptions_total", _C, "preemptions", "Requests put back because the KV cache was full."),
    _vllm("request_success_total", _C, "requests", "Requests that have ended, by reason.", "finished_reason"),
    _vllm("time_to_first_token_seconds", _H, "seconds", "From a request's arrival to its first token."),
    _vllm("inter_token_latency_seconds", _H, "seconds", "Between two tokens of an answer."),
    _vllm("e2e_request_latency_seconds", _H, "seconds", "From a request's arrival to its last token."),
    _vllm("request_queue_time_seconds", _H, "seconds", "Time that requests spent in the queue."),
)

BY_NAME = {metric.name: metric for metric in METRICS}
OURS = tuple(metric for metric in METRICS if metric.is_ours)

"""The alerts, each with its runbook: when it fires, what that means for users, where to look and what to do."""

from dataclasses import dataclass
from typing import Any

from ops.observe.query import gauge, quantile, rate

RUNBOOK_FOLDER = "ops/runbooks"


@dataclass(frozen=True)
class Alert:
    """One rule. `hold` is how long `expr` has to hold; `do` is a list of steps, in order."""

    name: str
    severity: str
    expr: str
    hold: str
    summary: str
    impact: str
    do: tuple[str, ...]


_STATUS = "`switchyard status` shows shards, replicas and engines; `switchyard events` what happened to them."
_DOCTOR = "`switchyard doctor` checks machine and cluster, and says what to do."
_5M = "5m"

ALERTS: tuple[Alert, ...] = (
    Alert(
        "SwitchyardUnreachable",
        "critical",
        'up{job="switchyard"} == 0',
        "1m",
        "The HTTP API does not answer Prometheus.",
        "Very likely nobody can use the model: requests enter through the same port.",
        (
            "`curl -i http://HOST:PORT/health` from the Prometheus host: is it the network, the port or the server?",
            _STATUS,
            "If `switchyard serve` has ended, `switchyard.err` in its log folder says why; start it again.",
        ),
    ),
    Alert(
        "SwitchyardRouterDown",
        "warning",
        gauge("switchyard_router_up", how="min") + " == 0",
        "30s",
        "The expert router does not answer.",
        "Requests go on with the routing tables that engines have. Workers that are lost or added are not noticed.",
        (
            "Serve restarts the router, and workers register again: wait for half a minute.",
            "If it stays away, the log `replica_*expert-router*.log` in the log folder says why.",
            _DOCTOR,
        ),
    ),
    Alert(
        "SwitchyardShardMissing",
        "critical",
        gauge("switchyard_shards_missing", how="max") + " > 0",
        "10s",
        "A shard has no worker.",
        "Every request waits, and after expert_timeout_s gets 503 with Retry-After, until a worker is back.",
        (
            "`switchyard events` says which worker was lost and why.",
            "Serve starts a replacement by itself; it takes as long as loading the shard.",
            "To be spared the next time: `spares: 1` or `replicas: 2` (`switchyard scale SHARD --replicas 2`).",
        ),
    ),
    Alert(
        "SwitchyardReplicasTooFew",
        "warning",
        f"{gauge('switchyard_replicas_wanted', 'shard', how='max')} > "
        + gauge("switchyard_replicas", "shard", how="max", where='state="online"'),
        "10m",
        "Shard {{ $labels.shard }} has fewer replicas than it shall have.",
        "Requests are served; the next loss of a worker of this shard may make them wait.",
        (
            _STATUS,
            "A replica that does not come up says why in its log, `replica_*experts-SHARD*.log`.",
            "If its machine has no room for it, lower the number: `switchyard scale SHARD --replicas N`.",
        ),
    ),
    Alert(
        "SwitchyardEngineStalled",
        "critical",
        gauge("switchyard_engines", how="max", where='state="stalled"') + " > 0",
        "30s",
        "An engine has waited for experts for longer than expert_timeout_s.",
        "The requests of that engine get 503 with Retry-After.",
        (
            "Look whether SwitchyardShardMissing fires too; then that page is the one to follow.",
            "If every shard has a worker, the engine cannot reach it: its log names the worker and the reason.",
            "Between hosts: is the worker's TCP port (`worker.host`) reachable from the engine's host?",
        ),
    ),
    Alert(
        "SwitchyardNoEngine",
        "critical",
        gauge("switchyard_engines", how="max", where='state="ready"') + " == 0",
        "1m",
        "No engine is ready.",
        "Nobody is served: HTTP answers 503.",
        (
            _STATUS,
            "An engine takes half a minute to start, and longer for large checkpoints.",
            "An engine that dies again and again says why in `replica_*engine*.log` of the log folder.",
        ),
    ),
    Alert(
        "SwitchyardEngineSilent",
        "warning",
        gauge("switchyard_engines_silent", how="max") + " > 0",
        "2m",
        "An engine does not answer when it is asked for its metrics.",
        "Its series are missing or old; it may be overloaded or hung.",
        (_STATUS, "If its requests do not end either, stop its process: Serve starts another engine."),
    ),
    Alert(
        "SwitchyardTableOutdated",
        "warning",
        f"{gauge('switchyard_engine_epoch', 'engine', how='max')} < on () group_left () "
        + gauge("switchyard_routing_epoch", how="max"),
        "2m",
        "Engine {{ $labels.engine }} works with an old routing table.",
        "It may ask workers that are gone, which costs retries, and does not use new ones.",
        (
            "The engine's log says `no news from the expert router` where it cannot reach it.",
            "If it stays behind, stop its process: Serve starts another engine.",
        ),
    ),
    Alert(
        "SwitchyardRetries",
        "warning",
        f"{rate('switchyard_retries_total', 'reason', window=_5M)} / on () group_left () "
        f"{rate('switchyard_messages_total', window=_5M)} > 0.01",
        "5m",
        "More than 1% of the messages to workers are sent again: {{ $labels.reason }}.",
        "Answers are right but slower.",
        (
            "`lost`: workers die or connections break; `switchyard events` says which.",
            "`expired`: workers are slower than expert_timeout_s / 3; compare switchyard_worker_queue_seconds and "
            "switchyard_worker_compute_seconds, and add replicas where the queue is long.",
            "`failed`, `not_finite`: a worker's kernel raises or computes NaN; its log has the traceback. Restart it: "
            "`switchyard restart WORKER`.",
            "`draining`, `resplit`: somebody drains or changes the plan; it ends by itself.",
        ),
    ),
    Alert(
        "SwitchyardWorkersAccused",
        "warning",
        "sum by (cause) (increase(switchyard_accusations_total[10m])) > 10",
        "5m",
        "Engines suspect workers of being {{ $labels.cause }}, again and again.",
        "Others are asked first, so the load is uneven; without others, calls wait.",
        (
            "`switchyard events` names the workers.",
            "`silent`: frozen, swapping, or its cores are taken by something else. Look at its host's load.",
            "`refused`, `wrong_secret`: it belongs to another cluster or model; stop it.",
            "`malformed`, `not_finite`, `failed`: replace it with `switchyard restart WORKER`.",
        ),
    ),
    Alert(
        "SwitchyardHostileBytes",
        "warning",
        f"{rate('switchyard_worker_rejected_total', 'replica', 'reason', window=_5M)} > 0",
        "1m",
        "Worker {{ $labels.replica }} closes connections: {{ $labels.reason }}.",
        "None for users: only that connection is closed. But somebody sends what no engine of this cluster sends.",
        (
            "Who reaches the data plane's port? It should be engines' hosts only: `worker.host`, and the firewall.",
            "A port scanner, or an engine of another version or cluster, is the usual cause.",
        ),
    ),
    Alert(
        "SwitchyardQueueOld",
        "warning",
        gauge("switchyard_worker_oldest_wait_seconds", "replica", how="max") + " > 1",
        "1m",
        "Calls wait for more than a second at worker {{ $labels.replica }}.",
        "Every token of the requests behind them is slower by that much.",
        (
            "One worker only: a hot shard. `switchyard scale SHARD --replicas N`.",
            "All workers: the cluster is full. Add replicas, or lower engine.max_num_seqs.",
        ),
    ),
    Alert(
        "SwitchyardKvCacheFull",
        "warning",
        gauge("vllm:kv_cache_usage_perc", "model_name", "engine", how="max") + " > 0.95",
        "5m",
        "The KV cache of engine {{ $labels.engine }} is full.",
        "Requests wait in the queue, and some are put back and computed again.",
        (
            "Give it more memory (`engine.kv_cache_gib`), or allow fewer or shorter requests (`engine.max_num_seqs`, "
            "`engine.max_model_len`).",
            "Or add an engine.",
        ),
    ),
    Alert(
        "SwitchyardFirstTokenSlow",
        "warning",
        quantile(0.95, "vllm:time_to_first_token_seconds", "model_name", window=_5M) + " > 10",
        "10m",
        "One request in twenty waits for its first token for more than 10 s.",
        "People think that it hangs.",
        (
            "Requests waiting (vllm:num_requests_waiting)? Then add engines, or memory for the KV cache.",
            "Else compare switchyard_wait_seconds with its usual values: if workers are slow, see SwitchyardQueueOld.",
        ),
    ),
    Alert(
        "SwitchyardFailoverSlow",
        "warning",
        quantile(0.99, "switchyard_failover_stall_seconds", window=_5M) + " > 5",
        "0s",
        "A failover took more than 5 s.",
        "Requests in flight paused for that long; none of them failed.",
        (
            "`switchyard events` shows what was lost. With a second replica a failover takes milliseconds, with a "
            "spare a fraction of a second, else the time that a worker takes to load.",
        ),
    ),
    Alert(
        "SwitchyardExpertsUneven",
        "info",
        f"max by (layer) ({rate('switchyard_expert_tokens_total', 'layer', 'expert', window='30m')}) / "
        f"avg by (layer) ({rate('switchyard_expert_tokens_total', 'layer', 'expert', window='30m')}) > 8",
        "1h",
        "An expert of layer {{ $labels.layer }} gets eight times its share.",
        "Its shard is the slowest, and every call waits for the slowest.",
        ("Give its shard another replica: `switchyard scale SHARD --replicas N`.",),
    ),
)


def rules() -> dict[str, Any]:
    """A Prometheus rule file."""
    return {"groups": [{"name": "switchyard", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.impact,
            "runbook": f"{RUNBOOK_FOLDER}/{alert.name}.md",
        },
    }


def runbook(alert: Alert) -> str:
    """The page of one alert."""
    summary = alert.summary.replace("{{ $labels.", "`").replace(" }}", "`")
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(alert.do, 1))
    return (
        f"# {alert.name}\n\n{summary}\n\nSeverity {alert.severity}; fires after {alert.hold} of\n\n"
        f"    {alert.expr}\n\n## What it means for users\n\n{alert.impact}\n\n## What to do\n\n{steps}\n"
    )

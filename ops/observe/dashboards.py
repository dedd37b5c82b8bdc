"""The Grafana dashboards, as the JSON that Grafana imports. Units come from the catalogue."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ops.observe.query import gauge, mean, quantile, rate

_UNITS = {
    "seconds": "s",
    "bytes per second": "Bps",
    "bytes": "bytes",
    "tokens per second": "short",
    "per second": "short",
    "count": "none",
    "share": "percentunit",
    "watts": "watt",
    "joules": "joule",
}
_PER_ROW, _HEIGHT, _GRID = 3, 8, 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A chart of (query, legend) pairs; `unit` is a key of _UNITS."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""


@dataclass(frozen=True)
class Dashboard:
    """One file; `uid` is its address in Grafana and its file's name."""

    uid: str
    title: str
    panels: Sequence[Panel]


def _quantiles(name: str, *by: str) -> tuple[tuple[str, str], ...]:
    where = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple((quantile(share, name, *by), f"p{share * 100:g} {where}".strip()) for share in (0.5, 0.95, 0.99))


_TOKENS = rate("vllm:generation_tokens_total", "model_name")
_JOULES = "switchyard_energy_joules_total"
_NOT_MEASURED = "Empty means not measured: neither NVML nor RAPL can be read (switchyard_energy_measured is 0)."
_WORKER_JOULES = rate(_JOULES, "id", where='kind="worker"')
_WORKER_TOKENS = f'label_replace({rate("switchyard_worker_tokens_total", "replica")}, "id", "$1", "replica", "(.*)")'

DASHBOARDS = (
    Dashboard(
        "switchyard-service",
        "Switchyard: service",
        (
            Panel("Generated tokens", "tokens per second", ((_TOKENS, "{{model_name}}"),)),
            Panel("Time to first token", "seconds", _quantiles("vllm:time_to_first_token_seconds", "model_name")),
            Panel("Inter-token latency", "seconds", _quantiles("vllm:inter_token_latency_seconds", "model_name")),
            Panel(
                "Requests",
                "count",
                (
                    (gauge("vllm:num_requests_running", "engine"), "running {{engine}}"),
                    (gauge("vllm:num_requests_waiting", "engine"), "waiting {{engine}}"),
                ),
            ),
            Panel(
                "KV cache in use", "share", ((gauge("vllm:kv_cache_usage_perc", "engine", how="max"), "{{engine}}"),)
            ),
            Panel("Time in the queue", "seconds", _quantiles("vllm:request_queue_time_seconds", "model_name")),
            Panel(
                "Ended requests",
                "per second",
                ((rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),),
            ),
            Panel("Whole request", "seconds", _quantiles("vllm:e2e_request_latency_seconds", "model_name")),
            Panel(
                "Work done twice",
                "per second",
                ((rate("vllm:num_preemptions_total", "engine"), "preempted {{engine}}"),),
                "Requests put back because the KV cache was full.",
            ),
        ),
    ),
    Dashboard(
        "switchyard-cluster",
        "Switchyard: cluster",
        (
            Panel("Engines", "count", ((gauge("switchyard_engines", "state", how="max"), "{{state}}"),)),
            Panel(
                "Replicas",
                "count",
                ((gauge("switchyard_replicas", "shard", "state", how="max"), "{{shard}} {{state}}"),),
            ),
            Panel(
                "Shards without a worker",
                "count",
                (
                    (gauge("switchyard_shards_missing", how="max"), "missing"),
                    (gauge("switchyard_spares", "state", how="max"), "spares {{state}}"),
                ),
            ),
            Panel(
                "Routing epoch",
                "count",
                (
                    (gauge("switchyard_routing_epoch", how="max"), "router"),
                    (gauge("switchyard_engine_epoch", "engine", how="max"), "{{engine}}"),
                ),
            ),
            Panel("Events", "per second", ((rate("switchyard_events_total", "kind"), "{{kind}}"),)),
            Panel(
                "Outages of shards",
                "seconds",
                (
                    (
                        "sum by (shard) (increase(switchyard_shard_outage_seconds_total[$__rate_interval]))",
                        "shard {{shard}}",
                    ),
                ),
            ),
            Panel("Failovers: stall", "seconds", _quantiles("switchyard_failover_stall_seconds")),
            Panel(
                "Retries and hedges",
                "per second",
                (
                    (rate("switchyard_retries_total", "reason"), "retry {{reason}}"),
                    (rate("switchyard_hedges_total", "reason"), "hedge {{reason}}"),
                    (rate("switchyard_accusations_total", "cause"), "accused {{cause}}"),
                ),
            ),
            Panel("Memory of experts", "bytes", ((gauge("switchyard_worker_memory_bytes", "replica"), "{{replica}}"),)),
        ),
    ),
    Dashboard(
        "switchyard-layer-calls",
        "Switchyard: layer calls and experts",
        (
            Panel(
                "Where a layer call's time goes",
                "seconds",
                tuple(
                    (mean(f"switchyard_{name}_seconds"), name)
                    for name in ("dispatch", "wait", "wire", "worker_queue", "worker_compute", "combine")
                ),
                "Means; wire, queue and compute lie within wait.",
            ),
            Panel("Wait", "seconds", _quantiles("switchyard_wait_seconds")),
            Panel("Wire", "seconds", _quantiles("switchyard_wire_seconds")),
            Panel(
                "Tokens by worker",
                "tokens per second",
                ((rate("switchyard_worker_tokens_total", "shard", "replica"), "{{shard}} {{replica}}"),),
            ),
            Panel(
                "Calls by worker", "per second", ((rate("switchyard_worker_messages_total", "replica"), "{{replica}}"),)
            ),
            Panel(
                "Oldest waiting call",
                "seconds",
                ((gauge("switchyard_worker_oldest_wait_seconds", "replica"), "{{replica}}"),),
            ),
            Panel("Bytes", "bytes per second", ((rate("switchyard_bytes_total", "direction"), "{{direction}}"),)),
            Panel(
                "Busiest experts",
                "tokens per second",
                (
                    (
                        f"topk(10, {rate('switchyard_expert_tokens_total', 'layer', 'expert')})",
                        "layer {{layer}} expert {{expert}}",
                    ),
                ),
            ),
            Panel(
                "Busiest expert by the mean",
                "count",
                (
                    (
                        f"max by (layer) ({rate('switchyard_expert_tokens_total', 'layer', 'expert')}) / "
                        f"avg by (layer) ({rate('switchyard_expert_tokens_total', 'layer', 'expert')})",
                        "layer {{layer}}",
                    ),
                ),
                "1 is even.",
            ),
        ),
    ),
    Dashboard(
        "switchyard-energy",
        "Switchyard: energy",
        (
            Panel(
                "Power",
                "watts",
                ((rate(_JOULES, "kind", "id", "source"), "{{kind}} {{id}} {{source}}"),),
                _NOT_MEASURED,
            ),
            Panel(
                "Energy per generated token",
                "joules",
                ((f"{rate(_JOULES)} / on () group_right () {_TOKENS}", "{{model_name}}"),),
                _NOT_MEASURED,
            ),
            Panel(
                "Generated tokens per kWh",
                "count",
                ((f"3600000 * {_TOKENS} / on () group_left () {rate(_JOULES)}", "{{model_name}}"),),
                _NOT_MEASURED,
            ),
            Panel(
                "Energy per token and layer, by worker",
                "joules",
                ((f"{_WORKER_JOULES} / on (id) {_WORKER_TOKENS}", "{{id}}"),),
                "A worker computes each token once for every layer. " + _NOT_MEASURED,
            ),
            Panel(
                "Measured",
                "count",
                ((gauge("switchyard_energy_measured", "source", how="max"), "{{source}}"),),
                "1: measured.",
            ),
        ),
    ),
)


def to_grafana(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana's import takes."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["switchyard"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    width = _GRID // _PER_ROW
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": {"x": number % _PER_ROW * width, "y": number // _PER_ROW * _HEIGHT, "w": width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": _UNITS[panel.unit]}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": _DATASOURCE, "expr": expr, "legendFormat": legend}
            for at, (expr, legend) in enumerate(panel.queries)
        ],
    }

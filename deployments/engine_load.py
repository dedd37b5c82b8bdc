"""How busy an engine is: a few of the counters that vLLM keeps in its API process (vllm/v1/metrics/loggers.py)."""

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.samples import Sample

_SUMS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_used": "vllm:kv_cache_usage_perc",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "finished": "vllm:request_success_total",
}
_HISTOGRAMS = {
    "first_token_s": "vllm:time_to_first_token_seconds",
    "inter_token_s": "vllm:inter_token_latency_seconds",
}


def engine_load(registry: CollectorRegistry = REGISTRY) -> dict[str, Any]:
    """Requests running and waiting, share of the KV cache in use, tokens and requests since the start, and latencies.

    A latency is {"le_s": upper bounds of buckets, "counts": observations up to each, and in all}. Numbers that vLLM
    does not keep (yet) are zero.
    """
    names = [*_SUMS.values(), *(f"{name}_bucket" for name in _HISTOGRAMS.values())]
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for metric in registry.restricted_registry(names).collect():
        for sample in metric.samples:
            if sample.name in samples:
                samples[sample.name].append(sample)
    return {
        **{key: sum(sample.value for sample in samples[name]) for key, name in _SUMS.items()},
        **{key: _histogram(samples[f"{name}_bucket"]) for key, name in _HISTOGRAMS.items()},
    }


def _histogram(samples: list[Sample]) -> dict[str, list[float]]:
    counts: dict[float, float] = {}
    for sample in samples:
        bound = float(sample.labels["le"])
        counts[bound] = counts.get(bound, 0.0) + sample.value
    bounds = sorted(counts)
    return {"le_s": bounds[:-1], "counts": [counts[bound] for bound in bounds]}

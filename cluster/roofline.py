"""How fast a layout can be at best: the time of one decode step from bytes, operations and messages.

A roofline: every part takes as long as the slower of its memory traffic and its arithmetic at peak rate (Williams,
Waterman, Patterson 2009, "Roofline"). What it assumes is ASSUMPTIONS; cluster/simulation.py adds queues and failures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.inventory import Chip

ASSUMPTIONS = (
    "every part runs at the peak memory bandwidth and arithmetic rate of its device: real kernels reach less",
    "tokens choose their experts evenly and independently of each other",
    "all requests decode at the same time, with contexts half full on average; prefill is not counted",
    "an engine and its workers take turns within a layer; several engines overlap where workers are free",
    "messages take their bytes over the network's bandwidth plus its latency, each way; within a node nothing",
    "all-reduces between the cards of one engine are not counted",
    "a layer call costs the dispatcher what ops/bench/constants.yaml says",
)

_BYTES = 2  # of a bf16 activation


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model, with its experts in one precision. Bytes unless a name says otherwise."""

    name: str
    precision: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    num_heads: int
    kv_parts: int
    expert_bytes: int
    expert_params: int
    dense_bytes: int
    dense_params: int
    kv_bytes_per_token: int

    @property
    def all_expert_bytes(self) -> int:
        return self.num_moe_layers * self.num_experts * self.expert_bytes


@dataclass(frozen=True)
class CallCost:
    """What a layer call costs beside kernels and wire: seconds, and seconds for each token in it."""

    call_s: float
    token_s: float


@dataclass(frozen=True)
class ShardLoad:
    """One shard: `chip` is the slowest that holds a replica of it; `is_local` when no message leaves the node."""

    num_layers: int
    first_layer: int
    num_experts: int
    chip: Chip
    num_replicas: int
    is_local: bool


@dataclass(frozen=True)
class EngineLoad:
    """The engines: how many, and on how many chips of which kind each of them runs."""

    count: int
    ranks: int
    chip: Chip


@dataclass(frozen=True)
class Speed:
    """Of the whole cluster. `parts` are the seconds of one step by what takes them, in the order of the step."""

    tokens_per_s: float
    itl_s: float
    parts: tuple[tuple[str, float], ...]
    bottleneck: str


def distinct_experts(num_local: int, num_experts: int, top_k: int, tokens: float) -> float:
    """Expected number of `num_local` experts that at least one of `tokens` tokens chooses."""
    return float(num_local * (1 - (1 - top_k / num_experts) ** tokens))


def visiting_share(num_local: int, num_experts: int, top_k: int) -> float:
    """Share of the tokens that choose at least one of `num_local` experts."""
    if num_local > num_experts - top_k:
        return 1.0
    return 1 - math.comb(num_experts - num_local, top_k) / math.comb(num_experts, top_k)


def expert_seconds(model: ModelFacts, chip: Chip, num_local: int, tokens: float) -> float:
    """One layer's `num_local` experts on one chip, for `tokens` tokens of the engine."""
    read = distinct_experts(num_local, model.num_experts, model.top_k, tokens) * model.expert_bytes
    pairs = tokens * model.top_k * num_local / model.num_experts
    return max(read / chip.bandwidth_bytes_s, 2 * model.expert_params * pairs / chip.flops)


def dense_seconds(model: ModelFacts, engine: EngineLoad, tokens: float, cached_tokens: float) -> float:
    """Attention, gates, shared experts, head and embeddings of one step; cached_tokens: KV entries that are read."""
    read = model.dense_bytes + cached_tokens * model.kv_bytes_per_token * engine.ranks / min(
        engine.ranks, model.kv_parts
    )
    return max(
        read / (engine.ranks * engine.chip.bandwidth_bytes_s),
        2 * model.dense_params * tokens / (engine.ranks * engine.chip.flops),
    )


def wire_seconds(
    model: ModelFacts, shards: Iterable[ShardLoad], tokens: float, bytes_s: float, latency_s: float
) -> float:
    """The messages of one layer, there and back, through the engine's one network card."""
    shares = [visiting_share(s.num_experts, model.num_experts, model.top_k) for s in shards if not s.is_local]
    return 2 * (sum(shares) * tokens * model.hidden_size * _BYTES / bytes_s + latency_s) if shares else 0.0


def estimate(
    model: ModelFacts,
    engines: EngineLoad,
    shards: Sequence[ShardLoad],
    *,
    concurrency: int,
    context_tokens: int,
    network_bytes_s: float,
    network_latency_s: float,
    call_cost: CallCost,
) -> Speed:
    """The speed when `concurrency` requests decode at once, divided evenly among the engines."""
    tokens = concurrency / engines.count
    dense_s = dense_seconds(model, engines, tokens, tokens * context_tokens / 2)
    dispatch_s = model.num_moe_layers * (call_cost.call_s + call_cost.token_s * tokens)
    experts_s = wire_s = 0.0
    for band in _bands(shards):
        experts_s += band[0].num_layers * max(expert_seconds(model, s.chip, s.num_experts, tokens) for s in band)
        wire_s += band[0].num_layers * wire_seconds(model, band, tokens, network_bytes_s, network_latency_s)
    parts = (
        ("attention and dense layers", dense_s),
        ("experts", experts_s),
        ("network", wire_s),
        ("dispatch", dispatch_s),
    )
    chain_s = sum(seconds for _, seconds in parts)
    busy_s = max(
        engines.count * s.num_layers * expert_seconds(model, s.chip, s.num_experts, tokens) / s.num_replicas
        for s in shards
    )
    step_s = max(chain_s, busy_s)
    longest = max(parts, key=lambda part: part[1])
    bottleneck = (
        f"expert workers: the busiest has no pause while {engines.count} engines ask it"
        if busy_s > chain_s
        else f"{longest[0]}: {longest[1] / chain_s:.0%} of a step"
    )
    return Speed(concurrency / step_s, step_s, parts, bottleneck)


def _bands(shards: Iterable[ShardLoad]) -> list[list[ShardLoad]]:
    """Shards of the same layers."""
    bands: dict[int, list[ShardLoad]] = {}
    for shard in shards:
        bands.setdefault(shard.first_layer, []).append(shard)
    return list(bands.values())

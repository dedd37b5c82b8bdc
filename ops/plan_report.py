"""What `switchyard plan` prints: for people, and as JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.advice import Advice
from cluster.inventory import to_document
from cluster.planner import ClusterPlan, Shortfall
from cluster.roofline import ASSUMPTIONS

_GB = 1e9
_FULL_LISTING = 40


def plan_lines(plan: ClusterPlan) -> list[str]:
    """Engines, shards, memory by device, speed with its assumptions."""
    return [*_engine_lines(plan), "", *_shard_lines(plan), "", *_device_lines(plan), "", *_speed_lines(plan)]


def plan_document(plan: ClusterPlan, ray_config: dict[str, Any]) -> dict[str, Any]:
    """The plan as JSON; `switchyard simulate` reads it."""
    return {
        "fits": True,
        "model": dataclasses.asdict(plan.model),
        "wishes": dataclasses.asdict(plan.wishes),
        "inventory": to_document(plan.inventory),
        "engines": plan.engines,
        "ranks": plan.ranks,
        "kv_tokens": plan.kv_tokens,
        "layout": dataclasses.asdict(plan.layout),
        "devices": [dataclasses.asdict(device) for device in plan.devices],
        "speed": {
            "tokens_per_s": plan.speed.tokens_per_s,
            "itl_s": plan.speed.itl_s,
            "step_s": dict(plan.speed.parts),
            "bottleneck": plan.speed.bottleneck,
        },
        "assumptions": list(ASSUMPTIONS),
        "ray_config": ray_config,
    }


def shortfall_lines(shortfall: Shortfall, advice: Sequence[Advice]) -> list[str]:
    """Why it does not fit, and what would help."""
    missing = f"; {shortfall.missing_bytes / _GB:.1f} GB are missing" if shortfall.missing_bytes else ""
    lines = [f"It does not fit: {shortfall.text}{missing}.", ""]
    if not advice:
        return [*lines, "No single change of precision, requests, cards or host memory makes it fit."]
    lines.append("What makes it fit, the cheapest first:")
    for each in advice:
        speed = each.plan.speed
        lines.append(f"  {each.text}: at best {speed.tokens_per_s:.1f} tokens/s, {_ms(speed.itl_s)} between tokens")
    return lines


def shortfall_document(shortfall: Shortfall, advice: Sequence[Advice]) -> dict[str, Any]:
    return {
        "fits": False,
        "why": shortfall.text,
        "missing_bytes": shortfall.missing_bytes,
        "advice": [
            {"change": each.text, "tokens_per_s": each.plan.speed.tokens_per_s, "itl_s": each.plan.speed.itl_s}
            for each in advice
        ],
    }


def _engine_lines(plan: ClusterPlan) -> Iterator[str]:
    wishes = plan.wishes
    yield (
        f"{plan.model.name}, experts in {plan.model.precision}: fits, for {wishes.concurrency} requests of "
        f"{wishes.context_tokens} tokens at the same time"
    )
    chips = f"{plan.ranks} GPU{'s' * (plan.ranks > 1)} each" if plan.on_gpu else "in host memory"
    nodes = _some(plan.layout.engine_nodes)
    yield f"engines: {plan.engines}, {chips}, on {nodes}; room for {plan.kv_tokens} tokens of KV cache in each"


def _shard_lines(plan: ClusterPlan) -> Iterator[str]:
    yield f"{'shard':>5}  {'layers':<9}{'experts':<9}{'where':<6}{'replicas':>8}  {'nodes':<28}shadow"
    shards = plan.layout.shards
    for number, shard in enumerate(shards[:_FULL_LISTING]):
        layers, experts = (f"{first}-{end - 1}" for first, end in (shard.layers, shard.experts))
        yield (
            f"{number:>5}  {layers:<9}{experts:<9}{shard.device:<6}{shard.replicas:>8}  "
            f"{_some(shard.nodes):<28}{shard.shadow or 'none'}"
        )
    yield from _rest(len(shards))


def _device_lines(plan: ClusterPlan) -> Iterator[str]:
    yield f"{'node':<16}{'device':<15}{'holds':<36}{'GB':>7}{'of':>8}{'KV GB':>8}"
    for use in plan.devices[:_FULL_LISTING]:
        kv = f"{use.kv_bytes / _GB:>8.1f}" if use.kv_bytes else ""
        yield (
            f"{use.node:<16}{use.device:<15}{use.holds:<36}{use.used_bytes / _GB:>7.1f}"
            f"{use.capacity_bytes / _GB:>8.1f}{kv}"
        )
    yield from _rest(len(plan.devices))


def _speed_lines(plan: ClusterPlan) -> Iterator[str]:
    speed = plan.speed
    yield (
        f"at best {speed.tokens_per_s:.1f} tokens/s for {plan.wishes.concurrency} requests, "
        f"{_ms(speed.itl_s)} between the tokens of one; of that"
    )
    for name, seconds in speed.parts:
        yield f"  {name:<28}{_ms(seconds):>10}"
    yield f"bottleneck: {speed.bottleneck}"
    yield "assumptions:"
    yield from (f"  - {assumption}" for assumption in ASSUMPTIONS)


def _rest(count: int) -> Iterator[str]:
    if count > _FULL_LISTING:
        yield f"  .. and {count - _FULL_LISTING} more; --json lists all"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, .. ({len(names)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

"""From machines and a model to a layout: engines, expert shards, replicas and shadows. Pure and deterministic.

make_plan() tries every sensible number of engines, with every number of cards each, and every sensible width of the
experts' first copy; it keeps the layout with the best roofline (cluster/roofline.py), the smaller one of equals. Cards
that are left get replicas of the busiest shards, host memory that is left shadows.

An engine has whole cards and a GPU worker a whole card. An inventory without GPUs is planned in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.config import LayoutSettings, ShardSettings
from cluster.engine_options import (
    RANKS,
    USABLE_SHARE,
    Engines,
    Wishes,
    chip_of,
    engine_options,
    has_gpus,
    kv_bytes_of,
    some_counts,
)
from cluster.inventory import Chip, Inventory, Node
from cluster.packing import Block, Slot, pack, pack_evenly
from cluster.roofline import CallCost, EngineLoad, ModelFacts, ShardLoad, Speed, estimate, expert_seconds

# Measured in resident memory: an engine is three processes that import vLLM, a worker is one; Ray itself.
ENGINE_PROCESS_BYTES = 2 << 30
WORKER_PROCESS_BYTES = 1 << 30
RAY_BYTES = 1 << 30

# A layout has to be so much faster to be preferred over one that needs fewer devices.
_WORTH_IT = 1.01


@dataclass(frozen=True)
class DeviceUse:
    """What one device holds. `holds` is for people; kv_bytes are part of used_bytes."""

    node: str
    device: str
    holds: str
    used_bytes: int
    kv_bytes: int
    capacity_bytes: int


@dataclass(frozen=True)
class ClusterPlan:
    """A layout that fits, and how fast it is at best. kv_tokens: room of one engine; ranks: chips of one engine."""

    model: ModelFacts
    inventory: Inventory
    wishes: Wishes
    layout: LayoutSettings
    engines: int
    ranks: int
    on_gpu: bool
    kv_tokens: int
    kv_bytes_per_rank: int
    devices: tuple[DeviceUse, ...]
    speed: Speed


@dataclass(frozen=True)
class Shortfall:
    """Why there is no layout, and how much memory is missing; 0 where the sum would do but no division of it does."""

    text: str
    missing_bytes: int


@dataclass(frozen=True)
class _Place:
    """A device that a worker could have. `index` counts the like devices of its node."""

    node: str
    device: str
    index: int
    chip: Chip
    capacity_bytes: int


def make_plan(model: ModelFacts, inventory: Inventory, wishes: Wishes, call_cost: CallCost) -> ClusterPlan | Shortfall:
    """The best layout that fits, or what is missing."""
    best: ClusterPlan | None = None
    most_units, least_missing = -1, 0
    for engines in engine_options(model, inventory, wishes):
        places = _places(model, inventory, wishes, engines)
        slots = [
            Slot(place.capacity_bytes // model.expert_bytes, place.chip.bandwidth_bytes_s / model.expert_bytes)
            for place in places
        ]
        units = sum(slot.capacity for slot in slots)
        if units > most_units:
            most_units = units
            least_missing = max(0, model.all_expert_bytes - sum(place.capacity_bytes for place in places))
        for blocks in _first_copies(slots, model):
            plan = _complete(model, inventory, wishes, call_cost, engines, places, blocks)
            if best is None or plan.speed.tokens_per_s > best.speed.tokens_per_s * _WORTH_IT:
                best = plan
    if best is not None:
        return best
    return _no_engine(model, inventory, wishes) if most_units < 0 else _no_room(model, most_units, least_missing)


# -- the experts' first copy ------------------------------------------------------------------------------------------


def _places(model: ModelFacts, inventory: Inventory, wishes: Wishes, engines: Engines) -> list[_Place]:
    """Devices for the first copy, the preferred ones first: GPUs before hosts, fast before slow."""
    places = []
    for node in inventory.nodes:
        if engines.on_gpu and node.gpu is not None:
            taken = engines.per_node * engines.ranks if node in engines.nodes else 0
            usable = int(node.gpu.memory_bytes * USABLE_SHARE)
            places += [_Place(node.name, "gpu", n, node.gpu, usable) for n in range(taken, node.num_gpus)]
        if not engines.on_gpu or wishes.host_experts:
            places += _host_places(model, node, engines)
    return sorted(places, key=lambda p: (p.device != "gpu", -p.chip.bandwidth_bytes_s, -p.capacity_bytes))


def _host_places(model: ModelFacts, node: Node, engines: Engines) -> list[_Place]:
    if node.host is None:
        return []
    count = node.num_host_workers
    room = (host_room(model, node, engines) // count) - WORKER_PROCESS_BYTES
    return [_Place(node.name, "cpu", n, node.host, room) for n in range(count)] if room >= model.expert_bytes else []


def host_room(model: ModelFacts, node: Node, engines: Engines) -> int:
    """Host memory of a node that experts may have; what runs there anyway is taken off."""
    assert node.host is not None
    usable = int(node.host.memory_bytes * node.num_host_workers * USABLE_SHARE)
    here = engines.per_node if node in engines.nodes else 0
    engine_bytes = 0 if engines.on_gpu else model.dense_bytes + engines.kv_tokens * model.kv_bytes_per_token
    return usable - RAY_BYTES - here * (ENGINE_PROCESS_BYTES + engine_bytes) - node.num_gpus * WORKER_PROCESS_BYTES


def _first_copies(slots: Sequence[Slot], model: ModelFacts) -> Iterator[tuple[Block, ...]]:
    """The fewest devices that hold all experts, then over more and more of them; nothing when all are not enough."""
    least = pack(slots, model.num_moe_layers, model.num_experts)
    if least is None:
        return
    fewest = max(block.slot for block in least) + 1
    for count in some_counts(fewest, min(len(slots), model.num_moe_layers * model.num_experts)):
        blocks = pack_evenly(slots[:count], model.num_moe_layers, model.num_experts)
        assert blocks is not None, "more devices hold what fewer do"
        yield blocks


# -- replicas, shadows, and the plan ----------------------------------------------------------------------------------


def _complete(
    model: ModelFacts,
    inventory: Inventory,
    wishes: Wishes,
    call_cost: CallCost,
    engines: Engines,
    places: Sequence[_Place],
    blocks: Sequence[Block],
) -> ClusterPlan:
    blocks = sorted(blocks, key=lambda block: (block.first_layer, block.first_expert))
    holders = _replicated(model, places, blocks, wishes.concurrency / engines.count)
    shards = tuple(_shard(block, held) for block, held in zip(blocks, holders, strict=True))
    shards = _with_shadows(model, inventory, engines, shards, {held[0].device for held in holders})
    layout = LayoutSettings(shards, tuple(node.name for node in engines.nodes))
    load = [_shard_load(block, held, layout) for block, held in zip(blocks, holders, strict=True)]
    speed = estimate(
        model,
        EngineLoad(engines.count, engines.ranks, engines.chip),
        load,
        concurrency=wishes.concurrency,
        context_tokens=wishes.context_tokens,
        network_bytes_s=inventory.network_bytes_s,
        network_latency_s=inventory.network_latency_s,
        call_cost=call_cost,
    )
    kv_bytes = engines.kv_tokens * kv_bytes_of(model, engines.ranks) // engines.ranks
    devices = (*_engine_uses(model, engines, kv_bytes), *_worker_uses(model, places, blocks, holders))
    return ClusterPlan(
        model=model,
        inventory=inventory,
        wishes=wishes,
        layout=layout,
        engines=engines.count,
        ranks=engines.ranks,
        on_gpu=engines.on_gpu,
        kv_tokens=engines.kv_tokens,
        kv_bytes_per_rank=kv_bytes,
        devices=(*devices, *_shadow_uses(model, inventory, engines, shards)),
        speed=speed,
    )


def _replicated(
    model: ModelFacts, places: Sequence[_Place], blocks: Sequence[Block], tokens: float
) -> list[list[_Place]]:
    """Who holds each block: its own device, and of those that are left each a copy of the busiest block that it can.

    Two replicas share a node only where no other node has such devices.
    """
    holders = [[places[block.slot]] for block in blocks]
    busy_s = [
        (block.end_layer - block.first_layer)
        * expert_seconds(model, places[block.slot].chip, block.end_expert - block.first_expert, tokens)
        for block in blocks
    ]
    used = {block.slot for block in blocks}
    for place in (place for slot, place in enumerate(places) if slot not in used):
        is_alone = all(other.node == place.node for other in places if other.device == place.device)
        able = [
            number
            for number, (block, held) in enumerate(zip(blocks, holders, strict=True))
            if held[0].device == place.device
            and block.units * model.expert_bytes <= place.capacity_bytes
            and (is_alone or place.node not in {other.node for other in held})
        ]
        if able:
            holders[max(able, key=lambda n: (busy_s[n] / len(holders[n]), -n))].append(place)
    return holders


def _shard(block: Block, held: Sequence[_Place]) -> ShardSettings:
    return ShardSettings(
        layers=(block.first_layer, block.end_layer),
        experts=(block.first_expert, block.end_expert),
        nodes=tuple(sorted({place.node for place in held})),
        device="gpu" if held[0].device == "gpu" else "cpu",
        replicas=len(held),
    )


def _with_shadows(
    model: ModelFacts,
    inventory: Inventory,
    engines: Engines,
    shards: tuple[ShardSettings, ...],
    devices: set[str],
) -> tuple[ShardSettings, ...]:
    """A shadow for every GPU shard without a second replica, on another node if there is room, else on its own."""
    if "cpu" in devices:  # host memory holds experts already
        return shards
    room = {node.name: host_room(model, node, engines) for node in inventory.nodes if node.host is not None}
    found = []
    for shard in shards:
        needed = _units(shard) * model.expert_bytes + WORKER_PROCESS_BYTES
        able = [name for name, free in room.items() if free >= needed] if shard.replicas == 1 else []
        if able:
            chosen = max(able, key=lambda name: (name not in shard.nodes, room[name], name))
            room[chosen] -= needed
            shard = replace(shard, shadow=chosen)
        found.append(shard)
    return tuple(found)


def _units(shard: ShardSettings) -> int:
    return (shard.layers[1] - shard.layers[0]) * (shard.experts[1] - shard.experts[0])


def _shard_load(block: Block, held: Sequence[_Place], layout: LayoutSettings) -> ShardLoad:
    nodes = {place.node for place in held}
    return ShardLoad(
        num_layers=block.end_layer - block.first_layer,
        first_layer=block.first_layer,
        num_experts=block.end_expert - block.first_expert,
        chip=min((place.chip for place in held), key=lambda chip: chip.bandwidth_bytes_s),
        num_replicas=len(held),
        is_local=len(nodes) == 1 and nodes == set(layout.engine_nodes),
    )


# -- memory by device -------------------------------------------------------------------------------------------------


def _engine_uses(model: ModelFacts, engines: Engines, kv_bytes: int) -> Iterator[DeviceUse]:
    used = math.ceil(model.dense_bytes / engines.ranks) + kv_bytes
    number = 0
    for node in engines.nodes:
        for each in range(engines.per_node):
            for rank in range(engines.ranks):
                holds = f"engine {number}" + (f", rank {rank} of {engines.ranks}" if engines.ranks > 1 else "")
                device = f"gpu {each * engines.ranks + rank}" if engines.on_gpu else "host"
                chip = chip_of(node, engines.on_gpu)
                extra = 0 if engines.on_gpu else ENGINE_PROCESS_BYTES
                yield DeviceUse(node.name, device, holds, used + extra, kv_bytes, int(chip.memory_bytes * USABLE_SHARE))
            number += 1


def _worker_uses(
    model: ModelFacts, places: Sequence[_Place], blocks: Sequence[Block], holders: Sequence[Sequence[_Place]]
) -> Iterator[DeviceUse]:
    held = {
        place: (number, block.units * model.expert_bytes)
        for number, (block, places_of) in enumerate(zip(blocks, holders, strict=True))
        for place in places_of
    }
    for place in sorted(places, key=lambda place: (place.device != "gpu", place.node, place.index)):
        number, used = held.get(place, (None, 0))
        holds = "free" if number is None else f"shard {number}"
        device = f"gpu {place.index}" if place.device == "gpu" else f"host worker {place.index}"
        yield DeviceUse(place.node, device, holds, used, 0, place.capacity_bytes)


def _shadow_uses(
    model: ModelFacts, inventory: Inventory, engines: Engines, shards: Iterable[ShardSettings]
) -> Iterator[DeviceUse]:
    by_node: dict[str, list[int]] = {}
    shards = list(shards)
    for number, shard in enumerate(shards):
        if shard.shadow is not None:
            by_node.setdefault(shard.shadow, []).append(number)
    for node in inventory.nodes:
        numbers = by_node.get(node.name)
        if numbers:
            used = sum(_units(shards[n]) * model.expert_bytes + WORKER_PROCESS_BYTES for n in numbers)
            holds = (
                f"shadow{'s' * (len(numbers) > 1)} of shard{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
            )
            yield DeviceUse(node.name, "host", holds, used, 0, host_room(model, node, engines))


# -- what is missing --------------------------------------------------------------------------------------------------


def _no_engine(model: ModelFacts, inventory: Inventory, wishes: Wishes) -> Shortfall:
    """No node has room for an engine with the KV cache that is wanted."""
    on_gpu = has_gpus(inventory)
    rooms = [
        int(chip_of(node, on_gpu).memory_bytes * USABLE_SHARE) * (_largest_ranks(node) if on_gpu else 1)
        for node in inventory.nodes
        if (node.gpu if on_gpu else node.host) is not None
    ]
    requests = math.ceil(wishes.concurrency / wishes.engines) if wishes.engines else 1
    needed = model.dense_bytes + requests * wishes.context_tokens * model.kv_bytes_per_token
    missing = max(0, needed - max(rooms))
    return Shortfall(
        f"no node has room for the engines: the part of {model.name} that is no expert takes "
        f"{model.dense_bytes / 1e9:.1f} GB in each of them, and {wishes.concurrency} requests of "
        f"{wishes.context_tokens} tokens take "
        f"{wishes.concurrency * wishes.context_tokens * model.kv_bytes_per_token / 1e9:.1f} GB of KV cache in all; "
        f"the largest node has {max(rooms) / 1e9:.1f} GB for one engine",
        missing,
    )


def _largest_ranks(node: Node) -> int:
    return max(ranks for ranks in RANKS if ranks <= max(1, node.num_gpus))


def _no_room(model: ModelFacts, units: int, missing_bytes: int) -> Shortfall:
    needed = model.num_moe_layers * model.num_experts
    text = (
        f"the experts of {model.name} take {model.all_expert_bytes / 1e9:.1f} GB in {model.precision}, "
        f"{model.expert_bytes / 1e9:.3f} GB for each of {needed}; beside the engines there is room for {units}"
    )
    if not missing_bytes:
        text += ", but each device holds whole experts of whole layers, and they cannot be divided that way"
    return Shortfall(text, missing_bytes)

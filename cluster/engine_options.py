"""The ways to place a model's engines on an inventory: on which nodes, how many on each, and of how many cards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.inventory import Chip, Inventory, Node
from cluster.roofline import ModelFacts

# Of a device's memory; the rest is for activations, the kernels' workspace and the process (model/sizes.py).
USABLE_SHARE = 0.9
RANKS = (1, 2, 4, 8)
# More devices than that are not tried one by one, but doubled.
_TRY_ALL = 16


@dataclass(frozen=True)
class Wishes:
    """What the cluster shall be able to do. engines None: as many as is fastest."""

    context_tokens: int
    concurrency: int
    host_experts: bool = False
    engines: int | None = None


@dataclass(frozen=True)
class Engines:
    """One way to place the engines: on each of `nodes` so many, of so many chips each."""

    nodes: tuple[Node, ...]
    per_node: int
    ranks: int
    chip: Chip
    kv_tokens: int
    on_gpu: bool

    @property
    def count(self) -> int:
        return len(self.nodes) * self.per_node


def engine_options(model: ModelFacts, inventory: Inventory, wishes: Wishes) -> Iterator[Engines]:
    """From few chips to many."""
    on_gpu = has_gpus(inventory)
    seen = set()
    for ranks in RANKS if on_gpu else (1,):
        if model.num_heads % ranks:
            continue
        for nodes in _node_orders(inventory, on_gpu, ranks):
            for per_node, num_nodes in _counts(nodes, ranks, on_gpu):
                engines = _engines(model, wishes, nodes[:num_nodes], per_node, ranks, on_gpu)
                key = (engines.nodes, per_node, ranks)
                if key not in seen and _is_wanted(engines, wishes):
                    seen.add(key)
                    yield engines


def has_gpus(inventory: Inventory) -> bool:
    """Whether engines run on GPUs, and experts too unless asked otherwise."""
    return any(node.gpu is not None for node in inventory.nodes)


def _node_orders(inventory: Inventory, on_gpu: bool, ranks: int) -> Iterator[list[Node]]:
    """Nodes that can have an engine: those with little memory first, which leaves the large ones to the experts; and
    the fast ones first."""
    able = [n for n in inventory.nodes if (n.num_gpus >= ranks if on_gpu else n.host is not None)]
    yield sorted(able, key=lambda node: chip_of(node, on_gpu).memory_bytes)
    if len({chip_of(node, on_gpu) for node in able}) > 1:
        yield sorted(able, key=lambda node: -chip_of(node, on_gpu).bandwidth_bytes_s)


def chip_of(node: Node, on_gpu: bool) -> Chip:
    """What an engine's rank runs on: a card, or the whole host."""
    chip = node.gpu if on_gpu else node.host
    assert chip is not None, "nodes without are not asked"
    if on_gpu:
        return chip
    count = node.num_host_workers
    return Chip(chip.memory_bytes * count, chip.bandwidth_bytes_s * count, chip.flops * count)


def _counts(nodes: Sequence[Node], ranks: int, on_gpu: bool) -> Iterator[tuple[int, int]]:
    """(engines on each node, nodes)."""
    for num_nodes in some_counts(1, len(nodes)):
        most = min(node.num_gpus for node in nodes[:num_nodes]) // ranks if on_gpu else 1
        for per_node in some_counts(1, most):
            yield per_node, num_nodes


def some_counts(low: int, high: int) -> list[int]:
    """Every number from low to high where these are few, else low doubled again and again, and high itself."""
    if high <= _TRY_ALL:
        return list(range(low, high + 1))
    found = []
    while low < high:
        found.append(low)
        low *= 2
    return [*found, high]


def _engines(
    model: ModelFacts, wishes: Wishes, nodes: Sequence[Node], per_node: int, ranks: int, on_gpu: bool
) -> Engines:
    chips = [chip_of(node, on_gpu) for node in nodes]
    slowest = min(chips, key=lambda chip: chip.bandwidth_bytes_s)
    if on_gpu:
        room = min(int(chip.memory_bytes * USABLE_SHARE) for chip in chips) - math.ceil(model.dense_bytes / ranks)
        kv_tokens = max(0, room * ranks // kv_bytes_of(model, ranks))
    else:
        kv_tokens = math.ceil(wishes.concurrency / (len(nodes) * per_node)) * wishes.context_tokens
    return Engines(tuple(nodes), per_node, ranks, slowest, kv_tokens, on_gpu)


def kv_bytes_of(model: ModelFacts, ranks: int) -> int:
    """One token in the KV caches of all ranks of an engine; ranks beyond kv_parts hold copies."""
    return model.kv_bytes_per_token * ranks // min(ranks, model.kv_parts)


def _is_wanted(engines: Engines, wishes: Wishes) -> bool:
    requests = math.ceil(wishes.concurrency / engines.count)
    return (
        wishes.engines in (None, engines.count)
        and engines.count <= wishes.concurrency
        and engines.kv_tokens >= requests * wishes.context_tokens
    )

"""An explicit layout, as pure decisions: its shards, what can be wrong with it, and how reality differs from it.

The dataclasses are in cluster/config.py, because they are settings; `switchyard plan` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.config import LayoutSettings, Settings, ShardSettings
from cluster.errors import ConfigError, InvalidTable
from cluster.inventory import NODE_LABEL
from cluster.placement import partition
from cluster.routing import RoutingTable, Shard


def shards_of(settings: Settings, num_layers: int, num_experts: int) -> tuple[Shard, ...]:
    """The layout's shards; without a layout every layer's experts divided among `workers`. Raises ConfigError."""
    if settings.layout is None:
        return partition(num_layers, num_experts, settings.workers)
    shards = tuple(
        Shard(number, tuple(range(*shard.experts)), *shard.layers)
        for number, shard in enumerate(_checked(settings.layout))
    )
    try:
        RoutingTable(0, "", num_layers, num_experts, shards, ()).validate()
    except InvalidTable as error:
        raise ConfigError(
            f"layout.shards: do not hold every expert once of {num_layers} layers with {num_experts} experts: {error}. "
            "`switchyard plan` writes a layout for this model."
        ) from None
    return shards


def replicas_of(settings: Settings, num_shards: int) -> dict[int, int]:
    """How many primaries each shard shall have."""
    if settings.layout is None:
        return dict.fromkeys(range(num_shards), settings.replicas)
    return {number: shard.replicas for number, shard in enumerate(settings.layout.shards)}


def most_replicas(settings: Settings) -> dict[int, int]:
    """How many primaries of a shard the layout's nodes have room for; shards without a limit are left out.

    On several nodes each takes its share of the replicas and no more, so that two never meet where one is planned.
    """
    if settings.layout is None:
        return {}
    return {number: shard.replicas for number, shard in enumerate(settings.layout.shards) if len(shard.nodes) > 1}


def num_workers(settings: Settings) -> int:
    """Primaries of all shards together."""
    if settings.layout is None:
        return settings.workers * settings.replicas
    return sum(shard.replicas for shard in settings.layout.shards)


def reserved_gpus(settings: Settings, by_default: float) -> tuple[float, float]:
    """Ray's num_gpus of all engines, and of all workers and spares. by_default: of one whose num_gpus is None."""

    def of_one(configured: float | None) -> float:
        return by_default if configured is None else configured

    worker = of_one(settings.worker.num_gpus)
    primaries = worker * num_workers(settings)
    if settings.layout is not None:
        primaries = sum(shard.replicas * (shard.device == "gpu") for shard in settings.layout.shards)
    return settings.engines * of_one(settings.engine.num_gpus), primaries + worker * settings.spares


def copies(settings: Settings) -> float:
    """How often the primaries hold all experts; a fraction where only some shards have more replicas."""
    if settings.layout is None:
        return settings.replicas
    sizes = [_area(shard) for shard in settings.layout.shards]
    held = [size * shard.replicas for size, shard in zip(sizes, settings.layout.shards, strict=True)]
    return sum(held) / sum(sizes)


def _area(shard: ShardSettings) -> int:
    return (shard.layers[1] - shard.layers[0]) * (shard.experts[1] - shard.experts[0])


def node_selector(nodes: Iterable[str]) -> dict[str, str]:
    """Ray's label selector for any of these nodes. Without spaces: to Ray 2.60 one is part of the name behind it."""
    names = sorted(set(nodes))
    return {NODE_LABEL: names[0] if len(names) == 1 else f"in({','.join(names)})"}


def per_node(count: int, nodes: tuple[str, ...]) -> int | None:
    """The most of `count` replicas that one of `nodes` may have; None, no limit, where there is no other node."""
    return count // len(nodes) if len(nodes) > 1 else None


def neighbours(layout: LayoutSettings, shard_id: int) -> tuple[int, ...]:
    """The shards in host memory that may share a node, and so its cores, with this one; itself included."""
    nodes = set(layout.shards[shard_id].nodes)
    return tuple(
        number
        for number, shard in enumerate(layout.shards)
        if number == shard_id or (shard.device == "cpu" and nodes & set(shard.nodes))
    )


def all_nodes(layout: LayoutSettings) -> tuple[str, ...]:
    """Every node that the layout names, sorted."""
    shadows = {shard.shadow for shard in layout.shards if shard.shadow is not None}
    return tuple(sorted({*layout.engine_nodes, *shadows, *(node for shard in layout.shards for node in shard.nodes)}))


def differences(layout: Mapping[str, Any], status: Mapping[str, Any]) -> list[str]:
    """Where the running cluster is not what was planned. `layout` and `status` as in Registry.status()."""
    found: list[str] = []
    for planned, shard in zip(layout["shards"], status["shards"], strict=True):
        found += _shard_differences(planned, shard)
    for engine in status["engines"]:
        if engine["node_name"] not in layout["engine_nodes"]:
            found.append(f"{engine['id']} runs on {_name(engine)}, planned is {_any_of(layout['engine_nodes'])}")
    return found


def _shard_differences(planned: Mapping[str, Any], shard: Mapping[str, Any]) -> Iterator[str]:
    online = [r for r in shard["replicas"] if r["state"] == "online" and r["role"] == "primary"]
    for replica in online:
        if replica["node_name"] not in planned["nodes"]:
            yield f"{replica['id']} runs on {_name(replica)}, planned is {_any_of(planned['nodes'])}"
        if device_kind(replica["device"]) != planned["device"]:
            device = replica["device"] or "an unknown device"
            yield f"{replica['id']} computes on {device}, planned is {planned['device']}"
    if len(online) != planned["replicas"]:
        yield f"shard {shard['id']} has {len(online)} replicas online, planned are {planned['replicas']}"


def device_kind(device: str) -> str:
    """gpu or cpu, of a device as a worker reports it."""
    return "gpu" if device.startswith("cuda") else "cpu" if device.startswith("cpu") else ""


def _checked(layout: LayoutSettings) -> tuple[ShardSettings, ...]:
    if not layout.shards:
        raise ConfigError("layout.shards: is empty. `switchyard plan` writes a layout.")
    for number, shard in enumerate(layout.shards):
        path = f"layout.shards[{number}]"
        for key in ("layers", "experts"):
            bounds = getattr(shard, key)
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
                raise ConfigError(f"{path}.{key}: must be two numbers, first and end, not {list(bounds)}.")
        _check_nodes(shard.nodes, shard.replicas, f"{path}.nodes")
    return layout.shards


def check_engine_nodes(settings: Settings) -> None:
    """Raises ConfigError unless the engines divide evenly among the layout's engine nodes."""
    if settings.layout is not None:
        _check_nodes(settings.layout.engine_nodes, settings.engines, "layout.engine_nodes")


def _check_nodes(nodes: tuple[str, ...], count: int, path: str) -> None:
    if not nodes or len(set(nodes)) != len(nodes):
        raise ConfigError(f"{path}: must name at least one node, and none twice, not {list(nodes)}.")
    if count % len(nodes):
        raise ConfigError(f"{path}: {count} do not divide evenly among {len(nodes)} nodes.")


def _name(thing: Mapping[str, Any]) -> str:
    return str(thing["node_name"]) or "a node without the label " + NODE_LABEL


def _any_of(nodes: Iterable[str]) -> str:
    return " or ".join(nodes)

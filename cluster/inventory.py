"""The machines of a cluster as a plan sees them: nodes, their GPUs, their host memory and the network between them.

    nodes:
      - name: big                     # letters, digits, - and _: also the value of the node's Ray label switchyard-node
        count: 1                      # so many alike, named big-0, big-1, ..; with 1 it is just big
        gpus: {kind: a100-80gb, count: 8}
              # or {count, memory_gb, bandwidth_gb_s, bf16_tflops} for a card that is not known by name
        host: {memory_gb: 512, bandwidth_gb_s: 200, bf16_tflops: 4, workers: 1}
              # workers: expert workers that divide this host's memory and cores (one for each NUMA node, say)
    network: {bandwidth_gbit_s: 100, latency_us: 20}     # between nodes; may be left out for a single node

GB are 10^9 bytes. Nothing here reads a file or asks a machine.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError

NODE_LABEL = "switchyard-node"
GB = 10**9

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,40}[A-Za-z0-9])?")
_MAX_COUNT = 10_000


@dataclass(frozen=True)
class Chip:
    """What computes: one GPU, or the share of a host that one worker has. Peak rates, from the maker or measured."""

    memory_bytes: int
    bandwidth_bytes_s: float
    flops: float
    """bf16 operations a second, dense, accumulated in float32."""

    def reaching(self, read: float, arithmetic: float) -> Chip:
        """With these shares of its bandwidth and of its arithmetic rate."""
        return Chip(self.memory_bytes, self.bandwidth_bytes_s * read, self.flops * arithmetic)


@dataclass(frozen=True)
class Node:
    """One machine. `gpu` is what each of its GPUs is; `host` what each of its `num_host_workers` shares of it is."""

    name: str
    num_gpus: int
    gpu: Chip | None
    num_host_workers: int
    host: Chip | None


@dataclass(frozen=True)
class Inventory:
    """Nodes in the order in which they were given; the network is what any two of them have between them."""

    nodes: tuple[Node, ...]
    network_bytes_s: float
    network_latency_s: float


def _chip(memory_gb: float, bandwidth_gb_s: float, tflops: float) -> Chip:
    return Chip(int(memory_gb * GB), bandwidth_gb_s * GB, tflops * 1e12)


# Memory, memory bandwidth and dense bf16 rate as in NVIDIA's data sheets: A100 (40 GB, 80 GB SXM), H100 SXM, H200 SXM,
# L40S, A10 and L4; for the GeForce cards, the GA102 and Ada whitepapers (fp16 with fp32 accumulation).
KNOWN_GPUS: Mapping[str, Chip] = {
    "a100-40gb": _chip(40, 1555, 312),
    "a100-80gb": _chip(80, 2039, 312),
    "h100-80gb": _chip(80, 3350, 989),
    "h200-141gb": _chip(141, 4800, 989),
    "l40s-48gb": _chip(48, 864, 362),
    "a10-24gb": _chip(24, 600, 125),
    "l4-24gb": _chip(24, 300, 121),
    "rtx4090-24gb": _chip(24, 1008, 165),
    "rtx3090-24gb": _chip(24, 936, 71),
}


def parse_inventory(document: Any) -> Inventory:
    """The parsed YAML document as an Inventory. Raises ConfigError that names the place and says what belongs there."""
    top = _mapping(document, "the inventory", ("nodes", "network"), ("nodes",))
    if not isinstance(top["nodes"], list) or not top["nodes"]:
        raise ConfigError("nodes: must be a list with at least one node.")
    nodes = [node for place, entry in enumerate(top["nodes"]) for node in _nodes(entry, f"nodes[{place}]")]
    names = [node.name for node in nodes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"nodes: the name {twice[0]} is given twice. Every node needs a name of its own.")
    if "network" not in top and len(nodes) > 1:
        raise ConfigError("network: is missing. Several nodes need {bandwidth_gbit_s, latency_us}.")
    if "network" not in top:
        return Inventory(tuple(nodes), math.inf, 0.0)
    keys = ("bandwidth_gbit_s", "latency_us")
    network = _mapping(top["network"], "network", keys, keys)
    bandwidth = _number(network["bandwidth_gbit_s"], "network.bandwidth_gbit_s")
    return Inventory(tuple(nodes), bandwidth * 1e9 / 8, _number(network["latency_us"], "network.latency_us") / 1e6)


def known_gpu(name: str) -> str | None:
    """The kind of a GPU by the name that its driver gives it, such as "NVIDIA A100-SXM4-80GB"; None if not known."""
    words = set(re.split(r"[^a-z0-9]+", name.lower().replace("rtx ", "rtx")))
    for kind in KNOWN_GPUS:
        model, memory = kind.split("-")
        is_ambiguous = sum(other.startswith(f"{model}-") for other in KNOWN_GPUS) > 1
        if model in words and (memory in words or not is_ambiguous):
            return kind
    return None


def to_document(inventory: Inventory) -> dict[str, Any]:
    """The inverse of parse_inventory, every node spelt out."""
    document: dict[str, Any] = {"nodes": [_node_document(node) for node in inventory.nodes]}
    if math.isfinite(inventory.network_bytes_s):
        document["network"] = {
            "bandwidth_gbit_s": inventory.network_bytes_s * 8 / 1e9,
            "latency_us": inventory.network_latency_s * 1e6,
        }
    return document


def _node_document(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = {"name": node.name}
    if node.gpu is not None:
        document["gpus"] = {"count": node.num_gpus, **_chip_document(node.gpu)}
    if node.host is not None:
        whole = Chip(
            node.host.memory_bytes * node.num_host_workers,
            node.host.bandwidth_bytes_s * node.num_host_workers,
            node.host.flops * node.num_host_workers,
        )
        document["host"] = {**_chip_document(whole), "workers": node.num_host_workers}
    return document


def _chip_document(chip: Chip) -> dict[str, float]:
    return {
        "memory_gb": chip.memory_bytes / GB,
        "bandwidth_gb_s": chip.bandwidth_bytes_s / GB,
        "bf16_tflops": chip.flops / 1e12,
    }


def _nodes(entry: Any, path: str) -> Iterable[Node]:
    fields = _mapping(entry, path, ("name", "count", "gpus", "host"), ("name",))
    name = fields["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{path}.name: {name!r} must be text of letters, digits, - and _, 42 at most.")
    if fields.get("gpus") is None and fields.get("host") is None:
        raise ConfigError(f"{path}: {name} has neither gpus nor host, so nothing can run on it.")
    num_gpus, gpu = _gpus(fields.get("gpus"), f"{path}.gpus")
    num_workers, host = _host(fields.get("host"), f"{path}.host")
    count = _count(fields.get("count", 1), f"{path}.count")
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(count)]
    return [Node(each, num_gpus, gpu, num_workers, host) for each in names]


_CHIP_KEYS = ("memory_gb", "bandwidth_gb_s", "bf16_tflops")


def _gpus(entry: Any, path: str) -> tuple[int, Chip | None]:
    if entry is None:
        return 0, None
    fields = _mapping(entry, path, ("kind", "count", *_CHIP_KEYS), ("count",))
    count = _count(fields["count"], f"{path}.count")
    if "kind" not in fields:
        return count, _chip_of(fields, path)
    if any(key in fields for key in _CHIP_KEYS):
        raise ConfigError(f"{path}: give either kind or {', '.join(_CHIP_KEYS)}, not both.")
    chip = KNOWN_GPUS.get(str(fields["kind"]))
    if chip is None:
        near = difflib.get_close_matches(str(fields["kind"]), KNOWN_GPUS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{path}.kind: {fields['kind']!r} is not known; the nearest is {near}. For another card give "
            f"{', '.join(_CHIP_KEYS)} instead."
        )
    return count, chip


def _host(entry: Any, path: str) -> tuple[int, Chip | None]:
    if entry is None:
        return 0, None
    fields = _mapping(entry, path, ("workers", *_CHIP_KEYS), _CHIP_KEYS)
    workers = _count(fields.get("workers", 1), f"{path}.workers")
    whole = _chip_of(fields, path)
    return workers, Chip(whole.memory_bytes // workers, whole.bandwidth_bytes_s / workers, whole.flops / workers)


def _chip_of(fields: Mapping[str, Any], path: str) -> Chip:
    for key in _CHIP_KEYS:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: is missing.")
    return _chip(*(_number(fields[key], f"{path}.{key}") for key in _CHIP_KEYS))


def _mapping(value: Any, path: str, keys: tuple[str, ...], needed: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: must be a mapping of {', '.join(keys)}.")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: there is no {key}. The nearest is {near}.")
    for key in needed:
        if key not in value:
            raise ConfigError(f"{path}: {key} is missing.")
    return value


def _count(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_COUNT:
        raise ConfigError(f"{path}: must be a whole number from 1 to {_MAX_COUNT}, not {value!r}.")
    return value


def _number(value: Any, path: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{path}: must be a number above 0, not {value!r}.")
    return float(value)

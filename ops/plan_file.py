"""A plan as `switchyard plan --json` has printed it, read back as the cluster that is simulated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config import EngineSettings
from cluster.errors import ConfigError
from cluster.inventory import Chip, Inventory, Node, parse_inventory
from cluster.roofline import EngineLoad, ModelFacts
from cluster.simulation import SimCluster, SimShard


def read_plan(path: Path) -> SimCluster:
    """What `switchyard plan --json` has printed. Raises ConfigError, naming the file."""
    document = read_yaml(path, "--plan")  # JSON is YAML
    if not isinstance(document, Mapping) or not document.get("fits"):
        raise ConfigError(f"{path} is not a plan that fits: write one with `switchyard plan .. --json > {path}`.")
    try:
        return _cluster(document)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a plan of this version ({error!r}): write it anew.") from None


def _cluster(document: Mapping[str, Any]) -> SimCluster:
    inventory = parse_inventory(document["inventory"])
    nodes = {node.name: node for node in inventory.nodes}
    layout, engines, ranks = document["layout"], document["engines"], document["ranks"]
    args = document["ray_config"]["applications"][0]["args"]["engine"]
    engine_nodes = [name for name in layout["engine_nodes"] for _ in range(engines // len(layout["engine_nodes"]))]
    return SimCluster(
        model=ModelFacts(**document["model"]),
        engine_nodes=tuple(engine_nodes),
        engine=EngineLoad(engines, ranks, _engine_chip(nodes[engine_nodes[0]], args["num_gpus"] > 0)),
        shards=tuple(_shard(shard, nodes) for shard in layout["shards"]),
        max_num_seqs=args.get("max_num_seqs", EngineSettings.max_num_seqs),
        max_num_batched_tokens=args["max_num_batched_tokens"],
        **_network(inventory),
    )


def _network(inventory: Inventory) -> dict[str, float]:
    return {"network_bytes_s": inventory.network_bytes_s, "network_latency_s": inventory.network_latency_s}


def _engine_chip(node: Node, on_gpu: bool) -> Chip:
    if on_gpu:
        assert node.gpu is not None
        return node.gpu
    assert node.host is not None
    count = node.num_host_workers
    return Chip(node.host.memory_bytes * count, node.host.bandwidth_bytes_s * count, node.host.flops * count)


def _shard(shard: Mapping[str, Any], nodes: Mapping[str, Node]) -> SimShard:
    workers = []
    for name in shard["nodes"]:
        chip = nodes[name].gpu if shard["device"] == "gpu" else nodes[name].host
        assert chip is not None
        workers += [(name, chip)] * (shard["replicas"] // len(shard["nodes"]))
    (first_layer, end_layer), (first_expert, end_expert) = shard["layers"], shard["experts"]
    return SimShard(first_layer, end_layer, first_expert, end_expert, tuple(workers))


def read_yaml(path: Path, option: str) -> Any:
    """Raises ConfigError, naming the option or the file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None

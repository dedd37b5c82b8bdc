"""The nodes of a running Ray cluster as an inventory: each is asked by a task that runs on it."""

from typing import Any

from cluster.errors import ConfigError
from cluster.inventory import NODE_LABEL

_SURVEY_LIMIT_S = 120.0
_NODE_ID_LABEL = "ray.io/node-id"


def survey_cluster(address: str) -> list[dict[str, Any]]:
    """Every living node, named by its label switchyard-node. Raises ConfigError when one has none, or none answers."""
    import ray

    from deployments.machine import survey

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(f"--ray: no Ray cluster answers at {address}: {error}") from None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = [name_of(node) for node in nodes]
    ask = ray.remote(num_cpus=0)(survey)
    answers = [ask.options(label_selector={_NODE_ID_LABEL: node["NodeID"]}).remote() for node in nodes]
    found = ray.get(answers, timeout=_SURVEY_LIMIT_S)
    return sorted(
        ({**answer, "name": name} for answer, name in zip(found, names, strict=True)), key=lambda each: each["name"]
    )


def name_of(node: dict[str, Any]) -> str:
    """A node's name by its label. Raises ConfigError for a node without."""
    name = node["Labels"].get(NODE_LABEL)
    if name is None:
        raise ConfigError(
            f"--ray: node {node['NodeManagerAddress']} has no name, so nothing can be pinned to it. Start it with "
            f"`ray start .. --labels {NODE_LABEL}=NAME`."
        )
    return str(name)

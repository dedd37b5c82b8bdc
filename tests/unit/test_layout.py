"""Explicit layouts: what they become in Ray Serve, what is refused, and how reality is compared with them."""

import pytest

from cluster.config import parse_settings
from cluster.errors import ConfigError
from cluster.layout import (
    all_nodes,
    copies,
    device_kind,
    differences,
    most_replicas,
    neighbours,
    node_selector,
    num_workers,
    per_node,
    replicas_of,
    shards_of,
)
from cluster.registry import Registry
from cluster.routing import RoutingTable
from deployments.app import build_app
from deployments.cores import worker_cores
from deployments.plan import make_plan
from ops.checks import check_nodes
from tests.golden import GOLDENS

MODEL = str(GOLDENS / "mixtral-tiny")


def layout(**changes: object) -> dict:
    """Of mixtral-tiny, 4 layers of 8 experts: two shards, the first twice, the second with a shadow."""
    first = {"layers": [0, 4], "experts": [0, 4], "nodes": ["b", "a"], "device": "gpu", "replicas": 2}
    second = {"layers": [0, 4], "experts": [4, 8], "nodes": ["a"], "device": "cpu", "shadow": "c"}
    return {"shards": [first, second], "engine_nodes": ["a", "b"], **changes}


def settings(**changes: object):
    return parse_settings({"model": MODEL, "engines": 2, "layout": layout(**changes)})


def test_shards_and_counts():
    parsed = settings()
    num_layers = make_plan({"model": MODEL}).spec.num_layers
    shards = shards_of(settings(shards=rescaled(num_layers)), num_layers, 8)
    assert [shard.experts for shard in shards] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert replicas_of(parsed, 2) == {0: 2, 1: 1} and num_workers(parsed) == 3 and copies(parsed) == 1.5
    assert most_replicas(parsed) == {0: 2}
    assert all_nodes(parsed.layout) == ("a", "b", "c")
    assert (
        node_selector(("b", "a")) == {"switchyard-node": "in(a,b)"} and node_selector(("a",))["switchyard-node"] == "a"
    )
    assert per_node(4, ("a", "b")) == 2 and per_node(3, ("a",)) is None and per_node(2, ()) is None


def rescaled(num_layers: int) -> list[dict]:
    return [{**shard, "layers": [0, num_layers]} for shard in layout()["shards"]]


def test_shards_in_host_memory_divide_the_cores_of_their_node():
    shards = [
        {"layers": [n, n + 1], "experts": [0, 8], "nodes": [node], "device": "cpu"} for n, node in enumerate("aba")
    ]
    parsed = settings(shards=shards)
    assert neighbours(parsed.layout, 0) == (0, 2) and neighbours(parsed.layout, 1) == (1,)
    assert worker_cores(parsed, 0, (0, 1)) == (0,) and worker_cores(parsed, 2, (0, 1)) == (1,)
    assert worker_cores(parsed, 1, (0, 1)) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": []}, "layout.shards: is empty"),
        ({"shards": [{"layers": [0, 4], "experts": [0, 4], "nodes": ["a"]}]}, "do not hold every expert once"),
        ({"shards": [{"layers": [0], "experts": [0, 8], "nodes": ["a"]}]}, r"layout.shards\[0\].layers: must be two"),
        ({"shards": [{"layers": [0, 4], "experts": [0, 8], "nodes": []}]}, r"layout.shards\[0\].nodes: must name"),
        (
            {"shards": [{"layers": [0, 4], "experts": [0, 8], "nodes": ["a", "b"], "replicas": 3}]},
            "3 do not divide evenly",
        ),
        (
            {"shards": [{"layers": [0, 4], "experts": [0, 8], "node": ["a"]}]},
            r"layout.shards\[0\].node:.*shards\[0\].nodes",
        ),
        ({"shards": [{"layers": [0, 4], "experts": [0, 8], "nodes": "a"}]}, r"nodes: must be a list, not text"),
        ({"engine_nodes": ["a", "b", "c"]}, "layout.engine_nodes: 2 do not divide evenly"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_plan({"model": MODEL, "engines": 2, "layout": layout(**changes)})


def test_deployments_are_pinned_and_spread():
    num_layers = make_plan({"model": MODEL}).spec.num_layers
    args = {"model": MODEL, "engines": 2, "engine": {"num_gpus": 1}, "layout": layout(shards=rescaled(num_layers))}
    found = {each.name: each for each in _deployments(build_app(args))}
    assert set(found) == {"engine", "expert-router", "experts-0", "experts-1", "shadow-1"}
    expected = {
        "engine": ({"num_gpus": 1, "label_selector": {"switchyard-node": "in(a,b)"}}, 2, 1),
        "experts-0": ({"num_gpus": 1, "label_selector": {"switchyard-node": "in(a,b)"}}, 2, 1),
        "experts-1": ({"num_gpus": 0, "label_selector": {"switchyard-node": "a"}}, 1, None),
        "shadow-1": ({"num_gpus": 0, "label_selector": {"switchyard-node": "c"}}, 1, None),
        "expert-router": ({"num_gpus": 0}, 1, None),
    }
    for name, (options, replicas, most) in expected.items():
        deployment = found[name]
        given = deployment.ray_actor_options
        assert {key: given[key] for key in ("num_gpus", "label_selector") if key in given} == options, name
        assert (deployment.num_replicas, deployment._replica_config.max_replicas_per_node) == (replicas, most), name


def _deployments(application) -> list:
    """Of a bound application and everything that it is bound to."""
    bound = application._bound_deployment
    found = [bound]
    for argument in bound.init_args:
        for each in argument if isinstance(argument, list) else [argument]:
            if hasattr(each, "_bound_deployment"):
                found += _deployments(each)
    return found


def test_serve_starts_no_other_machine():
    plan = make_plan({"model": MODEL})
    check_nodes(plan, "here")
    num_layers = plan.spec.num_layers
    plan = make_plan({"model": MODEL, "engines": 2, "layout": layout(shards=rescaled(num_layers))})
    with pytest.raises(ConfigError, match="names b, c, but"):
        check_nodes(plan, "a")


def test_no_more_replicas_than_the_layout_has_room_for():
    parsed = settings()
    shards = shards_of(parsed, 4, 8)
    registry = Registry(
        RoutingTable(1, "f", 4, 8, shards, ()), 5.0, replicas_of(parsed, 2), 0.0, 0.0, most_replicas(parsed)
    )
    registry.scale(1, 7, 0.0)
    with pytest.raises(ConfigError, match="room for 2 replicas of shard 0"):
        registry.scale(0, 3, 0.0)
    assert [shard["most"] for shard in registry.status(0.0)["shards"]] == [2, None]


def replica(node: str, device: str, state: str = "online", role: str = "primary") -> dict:
    return {"id": f"on-{node}", "node_name": node, "device": device, "state": state, "role": role}


def test_reality_is_compared_with_the_plan():
    planned = layout()
    as_planned = {
        "shards": [
            {"id": 0, "replicas": [replica("a", "cuda:0 NVIDIA A10"), replica("b", "cuda:0 NVIDIA A10")]},
            {"id": 1, "replicas": [replica("a", "cpu"), replica("c", "cpu", role="shadow")]},
        ],
        "engines": [{"id": "engine-1", "node_name": "a"}],
    }
    assert (
        differences(
            {**planned, "shards": [{"device": "cpu", "replicas": 1, **s} for s in planned["shards"]]}, as_planned
        )
        == []
    )
    reality = {
        "shards": [
            {"id": 0, "replicas": [replica("a", "cpu"), replica("b", "cuda:0 x", state="gone")]},
            {"id": 1, "replicas": [replica("", "cpu")]},
        ],
        "engines": [{"id": "engine-1", "node_name": "d"}],
    }
    found = differences(
        {**planned, "shards": [{"device": "cpu", "replicas": 1, **s} for s in planned["shards"]]}, reality
    )
    assert found == [
        "on-a computes on cpu, planned is gpu",
        "shard 0 has 1 replicas online, planned are 2",
        "on- runs on a node without the label switchyard-node, planned is a",
        "engine-1 runs on d, planned is a or b",
    ]
    assert [device_kind(text) for text in ("cuda:0 x", "cpu", "")] == ["gpu", "cpu", ""]

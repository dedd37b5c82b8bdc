"""Expert load added up over workers that come and go, and an engine's load out of vLLM's own series."""

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.expert_load import ExpertLoad, by_layers, encoded
from cluster.placement import partition
from cluster.routing import Endpoint, Replica, ReplicaState, RoutingTable
from deployments.engine_load import engine_load

SHARDS = partition(2, 4, 2)
TABLE = RoutingTable(1, "m", 2, 4, SHARDS, ())


def replica(name: str) -> Replica:
    """Of the second shard: experts 2 and 3 of both layers."""
    return Replica(name, 1, Endpoint("host", name, "127.0.0.1", 1), ReplicaState.ONLINE, 1, "node")


def test_experts_are_added_up_over_replicas_and_lives():
    """The sum never falls, or rate() would take it for a restart and count everything again."""
    load = ExpertLoad(TABLE)

    def report(name: str, *rows: list[int]) -> None:
        load.report(replica(name), encoded(np.array(rows)))

    report("a", [1, 2], [3, 4])
    report("b", [10, 0], [0, 0])
    report("a", [2, 2], [3, 5])
    assert load.total_LE.tolist() == [[0, 0, 12, 2], [0, 0, 3, 5]]
    load.keep({"b"})
    report("a", [1, 0], [0, 0])  # another life of that name
    assert load.total_LE[0].tolist() == [0, 0, 13, 2]


def test_the_number_of_series_is_bounded():
    tokens_LE = np.ones((58, 256), np.int64)
    load = by_layers(tokens_LE, 2048)
    assert len(load) <= 2048 and sum(tokens for _, _, tokens in load) == tokens_LE.size
    assert load[0][:2] == ("0-7", 0) and load[-1][:2] == ("56-57", 255)
    assert [label for label, _, _ in by_layers(np.ones((2, 3), np.int64), 2048)] == ["0"] * 3 + ["1"] * 3
    assert len(by_layers(np.ones((4, 5000), np.int64), 2048)) == 5000


def test_an_engines_load_is_read_from_vllms_series():
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "", ["engine"], registry=registry).labels("0").set(3)
    tokens = Counter("vllm:generation_tokens", "", ["engine"], registry=registry)
    tokens.labels("0").inc(5)
    tokens.labels("1").inc(7)
    latency = Histogram("vllm:time_to_first_token_seconds", "", ["engine"], buckets=(0.1, 1.0), registry=registry)
    latency.labels("0").observe(0.05)
    latency.labels("1").observe(5.0)
    load = engine_load(registry)
    assert (load["running"], load["waiting"], load["generated_tokens"]) == (3.0, 0, 12.0)
    assert load["first_token_s"] == {"le_s": [0.1, 1.0], "counts": [1.0, 1.0, 2.0]}
    assert load["inter_token_s"] == {"le_s": [], "counts": []}

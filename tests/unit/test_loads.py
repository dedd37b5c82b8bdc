"""Expert load added up over workers that come and go, and an engine's load out of vLLM's own series."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.expert_load import ExpertLoad
from cluster.routing import Shard
from deployments.engine_load import engine_load


def test_experts_are_added_up_over_replicas_and_lives():
    load = ExpertLoad(2, 4)
    shard = Shard(1, (2, 3), 0, 2)
    load.report("a", shard, [[1, 2], [3, 4]])
    load.report("b", shard, [[10, 0], [0, 0]])
    load.report("a", shard, [[2, 2], [3, 5]])
    assert load.total_LE.tolist() == [[0, 0, 12, 2], [0, 0, 3, 5]]
    load.forget_all_but(["b"])
    load.report("a", shard, [[1, 0], [0, 0]])  # another life of that name
    assert load.total_LE[0].tolist() == [0, 0, 13, 2]


def test_counters_of_another_shape_are_ignored():
    load = ExpertLoad(2, 4)
    for tokens in ([[1, 2]], [[1], [2]], []):
        load.report("a", Shard(1, (2, 3), 0, 2), tokens)
    assert not load.total_LE.any()


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

"""Inventories: what is read, and what is said about what cannot be."""

import pytest

from cluster.errors import ConfigError
from cluster.inventory import GB, KNOWN_GPUS, known_gpu, parse_inventory, to_document
from deployments.machine import gpus_of

HOST = {"memory_gb": 100, "bandwidth_gb_s": 50, "bf16_tflops": 1}


def node(**changes: object) -> dict:
    return {"name": "a", "gpus": {"kind": "h100-80gb", "count": 2}, "host": dict(HOST), **changes}


def test_nodes_alike_are_numbered_and_hosts_divided():
    inventory = parse_inventory(
        {
            "nodes": [node(count=2), {"name": "b", "host": {**HOST, "workers": 4}}],
            "network": {"bandwidth_gbit_s": 80, "latency_us": 10},
        }
    )
    assert [each.name for each in inventory.nodes] == ["a-0", "a-1", "b"]
    assert inventory.nodes[0].gpu == KNOWN_GPUS["h100-80gb"] and inventory.nodes[0].num_gpus == 2
    assert inventory.nodes[2].host.memory_bytes == 25 * GB and inventory.nodes[2].host.bandwidth_bytes_s == 12.5 * GB
    assert inventory.network_bytes_s == 10 * GB and inventory.network_latency_s == pytest.approx(1e-5)
    assert parse_inventory(to_document(inventory)) == inventory


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "must be a mapping of nodes, network"),
        ({}, "nodes is missing"),
        ({"nodes": []}, "at least one node"),
        ({"nodes": [{}]}, r"nodes\[0\]: name is missing"),
        ({"nodes": [{"name": "a"}]}, "neither gpus nor host"),
        ({"nodes": [node(name="a b")]}, r"nodes\[0\].name: 'a b' must be text of letters"),
        ({"nodes": [node(gpu={})]}, "there is no gpu. The nearest is gpus"),
        ({"nodes": [node(), node()], "network": {"bandwidth_gbit_s": 1, "latency_us": 1}}, "a is given twice"),
        ({"nodes": [node(count=2)]}, "network: is missing"),
        ({"nodes": [node(count=0)]}, r"nodes\[0\].count: must be a whole number"),
        ({"nodes": [node(gpus={"kind": "h100", "count": 1})]}, "'h100' is not known; the nearest is h100-80gb"),
        ({"nodes": [node(gpus={"kind": "h100-80gb"})]}, r"gpus: count is missing"),
        ({"nodes": [node(gpus={"kind": "h100-80gb", "count": 1, "memory_gb": 9})]}, "either kind or memory_gb"),
        ({"nodes": [node(gpus={"count": 1, "memory_gb": 9})]}, "gpus.bandwidth_gb_s: is missing"),
        ({"nodes": [node(host={**HOST, "memory_gb": -1})]}, "host.memory_gb: must be a number above 0"),
        ({"nodes": [node(host={**HOST, "memory_gb": True})]}, "host.memory_gb: must be a number above 0"),
        ({"nodes": [node()], "network": {"bandwidth_gbit_s": "x", "latency_us": 1}}, "network.bandwidth_gbit_s"),
    ],
)
def test_what_is_wrong_is_named(document, words):
    with pytest.raises(ConfigError, match=words):
        parse_inventory(document)


def test_cards_are_known_by_the_drivers_names():
    assert known_gpu("NVIDIA H100 80GB HBM3") == "h100-80gb"
    assert known_gpu("NVIDIA A100-SXM4-40GB") == "a100-40gb" and known_gpu("NVIDIA A100 80GB PCIe") == "a100-80gb"
    assert known_gpu("NVIDIA GeForce RTX 4090") == "rtx4090-24gb" and known_gpu("Tesla T4") is None
    assert gpus_of([]) is None and gpus_of(["NVIDIA H200"] * 2) == {"kind": "h200-141gb", "count": 2}
    for names in (["Tesla T4"], ["NVIDIA L4", "NVIDIA A10"]):
        with pytest.raises(ConfigError, match="--inventory"):
            gpus_of(names)

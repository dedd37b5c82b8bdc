"""A cluster of several hosts, brought up by `switchyard up` and `switchyard join`, that loses hosts while it answers.

The hosts are namespaces of this computer (tests/hosts.py): that needs root, and without it these tests are skipped and
say so at the end of the run.
"""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from ops.node_environment import RAY_PORT
from tests.golden import GOLDENS
from tests.hosts import Host, network, why_not
from tests.serving import wait_until
from tests.streams import Answer, Load, ask

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"hosts are not tested here: {why_not()}"),
]

PORT = 8000
STREAMS = 16
# Half of a shard's replicas are gone without a word. Two cores have sixteen streams take turns, and three Rays to run.
LONGEST_GAP_S = 5.0
HEAD, JOINING = "ant", ("bee", "cat", "dog")
# Two replicas of each shard, on different hosts; the head has one of them, beside the engine.
LAYOUT = {
    "engine_nodes": [HEAD],
    "shards": [
        {"layers": [0, 3], "experts": [0, 4], "nodes": [HEAD, "bee"], "device": "cpu", "replicas": 2},
        {"layers": [0, 3], "experts": [4, 8], "nodes": ["cat", "dog"], "device": "cpu", "replicas": 2},
    ],
}
# Run on a host: how one of its processes is connected.
CONNECTIONS = """
import json, psutil, sys
process = psutil.Process(int(sys.argv[1]))
peers = [each.raddr.ip for each in process.net_connections("tcp") if each.status == "ESTABLISHED"]
shared = [each.path for each in process.memory_maps() if "memfd:" in each.path]
print(json.dumps({"peers": sorted(set(peers)), "shared": len(shared)}))
"""


@dataclass
class Cluster:
    """What tests.streams wants of one: a URL, which only threads in the head's network reach, and the model's name."""

    hosts: dict[str, Host]
    url: str = f"http://127.0.0.1:{PORT}"
    model: str = "mixtral-tiny"

    @property
    def head(self) -> Host:
        return self.hosts[HEAD]

    def status(self) -> dict[str, Any]:
        return json.loads(self.head.ask("status", "--json"))

    def online(self) -> dict[str, dict[str, Any]]:
        """Replicas that serve, by the name of their host."""
        replicas = [each for shard in self.status()["shards"] for each in shard["replicas"]]
        return {each["node_name"]: each for each in replicas if each["state"] == "online"}

    def join(self, *names: str) -> None:
        for name in names:
            host = self.hosts[name]
            shutil.copy(self.head.folder / "token", host.folder / "token")
            host.start("join.log", "join", self.head.address, "--token-file", "/tmp/token")
            # Each imports vLLM; all at once on two cores, and Ray gives up on the last one.
            wait_until(lambda host=host: "joined." in host.said("join.log"), f"{name} has joined")

    def wait_for(self, *names: str) -> None:
        """Until replicas serve on these hosts and nowhere else; for a while after a partition nobody can say."""

        def is_so() -> bool:
            try:
                return set(self.online()) == set(names)
            except AssertionError:
                return False

        wait_until(is_so, f"replicas on {names} and nowhere else", 240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    args = {
        "model": str(GOLDENS / "mixtral-tiny"),
        "dtype": "float32",
        "engine": {"kv_cache_gib": 0.25, "enforce_eager": True},
        "layout": LAYOUT,
    }
    with network(folder, HEAD, *JOINING) as hosts:
        cluster = Cluster(hosts)
        application = {"name": "switchyard", "import_path": "deployments.app:build_app", "args": args}
        (cluster.head.folder / "config.yaml").write_text(yaml.safe_dump({"applications": [application]}))
        cluster.head.start(
            "up.log",
            "up",
            "--address",
            cluster.head.address,
            "--token-file",
            "/tmp/token",
            "--config",
            "/tmp/config.yaml",
        )
        wait_until(lambda: "starting Ray" in cluster.head.said("up.log"), "the head starts its Ray")
        wait_until(lambda: cluster.head.listens_on(RAY_PORT), "others can join")
        cluster.join(*JOINING)
        wait_until(lambda: "ready: " in cluster.head.said("up.log"), "the model is served", 400)
        yield cluster
        for name in (*JOINING, HEAD):
            if hosts[name].is_up:
                hosts[name].ask("down")


def ask_on_head(cluster: Cluster) -> Answer:
    with ThreadPoolExecutor(initializer=cluster.head.enter_network) as pool:
        return pool.submit(ask, cluster).result()


def wait_for_more(load: Load, count: int) -> None:
    wanted = len(load.answers) + count
    wait_until(lambda: len(load.answers) >= wanted or bool(load.errors), f"{count} more answers")


def test_shards_are_spread_and_linked_by_tcp_between_hosts_and_by_shared_memory_within_one(cluster):
    cluster.wait_for(HEAD, *JOINING)
    ask_on_head(cluster)
    for name, replica in cluster.online().items():
        links = json.loads(cluster.hosts[name].run_python(CONNECTIONS, str(replica["pid"])))
        if name == HEAD:
            assert links["peers"] == [] and links["shared"] > 0
        else:
            assert links["peers"] == [cluster.head.address] and links["shared"] == 0


def test_a_partitioned_host_costs_no_request_and_takes_load_again_when_it_is_back(cluster, capsys):
    cluster.wait_for(HEAD, *JOINING)
    undisturbed = ask_on_head(cluster).text
    host = cluster.hosts["dog"]
    load = Load(cluster, STREAMS, cluster.head.enter_network)
    try:
        wait_for_more(load, STREAMS)
        before = len(load.answers)
        host.unplug()
        unplugged_s = time.monotonic()
        wait_for_more(load, STREAMS)
        cluster.wait_for(HEAD, "bee", "cat")
        noticed_s = time.monotonic() - unplugged_s
        host.plug_in()
        wait_until(lambda: "Ray has ended" in host.said("join.log"), "the host has learnt that it was out")
        cluster.join("dog")
        cluster.wait_for(HEAD, *JOINING)
        joined_s = time.monotonic() - unplugged_s
        wait_until(lambda: cluster.online()["dog"]["load"].get("tokens", 0) > 0, "the host computes again")
        wait_for_more(load, STREAMS)
    finally:
        load.stop()
    assert load.errors == []
    assert {answer.text for answer in load.answers} == {undisturbed}
    calm = max(answer.longest_gap_s for answer in load.answers[:before])
    worst = max(answer.longest_gap_s for answer in load.answers[before:])
    with capsys.disabled():
        print(
            f"\npartition: {len(load.answers)} answers of {STREAMS} streams, none failed or changed; longest gap "
            f"{worst:.2f} s, before {calm:.2f} s; out of the table after {noticed_s:.1f} s, back after {joined_s:.1f} s"
        )
    assert worst < LONGEST_GAP_S


def test_a_host_that_dies_costs_no_request(cluster):
    cluster.wait_for(HEAD, *JOINING)
    undisturbed = ask_on_head(cluster).text
    load = Load(cluster, STREAMS, cluster.head.enter_network)
    try:
        wait_for_more(load, STREAMS)
        cluster.hosts["cat"].end()
        wait_for_more(load, STREAMS)
        cluster.wait_for(HEAD, "bee", "dog")
        wait_for_more(load, STREAMS)
    finally:
        load.stop()
    assert load.errors == []
    assert {answer.text for answer in load.answers} == {undisturbed}

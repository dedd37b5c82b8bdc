"""The plan for the demo model on this machine, deployed from its own output."""

import contextlib
import io
import json
import urllib.request

import pytest
import yaml

from deployments.machine import node_name
from ops.cli import main
from ops.status import render
from tests.serving import Serving

pytestmark = pytest.mark.timeout(600)


def planned(*options: str) -> dict:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["plan", "--model", "demo", "--json", *options]) == 0
    return json.loads(output.getvalue())


def test_the_plan_is_deployed_from_its_own_output(serving: Serving, tmp_path):
    inventory = tmp_path / "inventory.yaml"
    host = {"memory_gb": 16, "bandwidth_gb_s": 18, "bf16_tflops": 0.1, "workers": 2}
    inventory.write_text(yaml.safe_dump({"nodes": [{"name": node_name(), "host": host}]}))
    plan = planned("--inventory", str(inventory))
    assert len(plan["layout"]["shards"]) == 2
    args = plan["ray_config"]["applications"][0]["args"]
    serving.deploy({**args, "engine": {**args["engine"], "enforce_eager": True, "kv_cache_gib": 0.25}})
    body = {"model": serving.model, "prompt": "It was", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{serving.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 8
    status = serving.ask("control", method="status")
    assert "as planned" in render(status)
    held = {(tuple(shard["layers"]), shard["num_experts"]) for shard in status["shards"]}
    assert held == {
        (tuple(shard["layers"]), shard["experts"][1] - shard["experts"][0]) for shard in plan["layout"]["shards"]
    }
    replicas = [replica for shard in status["shards"] for replica in shard["replicas"]]
    assert {(replica["device"], replica["node_name"]) for replica in replicas} == {("cpu", node_name())}

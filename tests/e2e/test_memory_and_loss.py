"""What is where, by measured memory; and what happens to a request when the only worker of its experts is killed."""

import contextlib
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from deployments.vllm_app import engine_processes, is_alive
from model.nursery_client import TITLE
from ops.bench.make_model import ModelShape, make_model
from tests import golden
from tests.serving import Serving, wait_until

pytestmark = pytest.mark.timeout(600)

SMALL = golden.GOLDENS / "mixtral-tiny"
SHAPE = ModelShape(hidden=512, expert=2048, layers=8, experts=8, top_k=2, heads=8, kv_heads=4, vocab=1024)
EXPERT_BYTES = SHAPE.layers * SHAPE.experts * 3 * SHAPE.hidden * SHAPE.expert * 2  # bfloat16


def deploy(serving: Serving, model: Path, workers: int, expert_timeout_s: float = 30.0) -> None:
    serving.deploy(
        {
            "model": str(model),
            "dtype": "bfloat16",
            "workers": workers,
            "expert_timeout_s": expert_timeout_s,
            "engine": {"kv_cache_gib": 0.1, "enforce_eager": True, "max_model_len": 128},
        }
    )


def private_bytes(serving: Serving) -> tuple[int, list[int]]:
    """Memory that belongs to one process alone (USS): the engine's vLLM worker, and the expert workers, ascending."""
    (engine,) = engine_workers(serving)
    experts = [replica["pid"] for replica in serving.ask("status")["table"]["replicas"]]
    engine_bytes, *expert_bytes = (psutil.Process(pid).memory_full_info().uss for pid in (engine.pid, *experts))
    return engine_bytes, sorted(expert_bytes)


def test_a_request_outlives_the_only_worker_of_its_experts(serving: Serving) -> None:
    deploy(serving, SMALL, workers=2)
    undisturbed = complete(serving, num_tokens=48)
    table = serving.ask("status")["table"]
    victim = table["replicas"][0]["pid"]
    answers: list[str] = []
    request = threading.Thread(target=lambda: answers.append(complete(serving, num_tokens=48)))
    served = calls(serving)
    request.start()
    wait_until(lambda: calls(serving) > served, "the request has reached the workers")
    os.kill(victim, signal.SIGKILL)
    request.join(120)
    assert answers == [undisturbed]
    table_after = serving.ask("status")["table"]
    assert victim not in [replica["pid"] for replica in table_after["replicas"]]
    assert table_after["epoch"] > table["epoch"]


def test_engines_hold_no_expert_and_each_worker_its_share(serving: Serving, tmp_path: Path) -> None:
    model = tmp_path / "random-mixtral"
    make_model(model, SHAPE)
    deploy(serving, SMALL, workers=2)
    engine_before, workers_before = private_bytes(serving)
    deploy(serving, model, workers=2)
    engine_after, workers_after = private_bytes(serving)
    assert engine_after - engine_before < 0.2 * EXPERT_BYTES
    for before, after in zip(workers_before, workers_after, strict=True):
        assert 0.45 * EXPERT_BYTES < after - before < 0.75 * EXPERT_BYTES


def test_an_engine_outlives_the_time_without_experts(serving: Serving) -> None:
    """Past expert_timeout_s its requests get 503, streams an error event; when the worker is back it serves again."""
    deploy(serving, SMALL, workers=1, expert_timeout_s=1.0)
    undisturbed = complete(serving, num_tokens=48)
    engine = engine_workers(serving)
    victim = serving.ask("status")["table"]["replicas"][0]["pid"]
    served = calls(serving)
    streamed: list[str] = []
    stream = threading.Thread(target=lambda: streamed.extend(stream_events(serving, num_tokens=100)))
    stream.start()
    wait_until(lambda: calls(serving) > served, "the request has reached the workers")
    kill_nurseries(serving)  # else the worker has a successor within the time
    os.kill(victim, signal.SIGKILL)
    stream.join(60)
    assert json.loads(streamed[-2].removeprefix("data: "))["error"]["code"] == 503
    assert streamed[-1] == "data: [DONE]"
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(serving, num_tokens=4)
    assert refused.value.code == 503 and int(refused.value.headers["Retry-After"]) > 0
    wait_until(lambda: is_served(serving), "the worker is back", limit_s=120)
    assert complete(serving, num_tokens=48) == undisturbed
    assert engine and all(map(is_alive, engine))


def kill_nurseries(serving: Serving) -> None:
    """The next worker process needs a nursery of its own replica, which takes seconds to import vLLM."""
    found = []
    for process in psutil.Process(serving.process_id).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if TITLE in " ".join(process.cmdline()):
                found.append(process)
    assert found
    for process in found:
        process.kill()


def engine_workers(serving: Serving) -> list[psutil.Process]:
    """The engine's vLLM workers, while the nursery that has forked them lives."""
    (engine,) = serving.ask("status")["engines"]
    return engine_processes(engine["pid"])[1:]


def stream_events(serving: Serving, num_tokens: int) -> list[str]:
    body = {
        "model": serving.model,
        "prompt": [5, 6, 7, 8],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{serving.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return [line for line in response.read().decode().splitlines() if line]


def is_served(serving: Serving) -> bool:
    try:
        complete(serving, num_tokens=1)
    except urllib.error.HTTPError as refused:
        assert refused.code == 503
        return False
    return True


def complete(serving: Serving, num_tokens: int) -> str:
    body = {
        "model": serving.model,
        "prompt": [5, 6, 7, 8],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{serving.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["token_ids"])


def calls(serving: Serving) -> int:
    """Layer calls that the engine has made so far."""
    with urllib.request.urlopen(f"{serving.url}/switchyard/stats", timeout=60) as response:
        return int(json.load(response)["calls"])

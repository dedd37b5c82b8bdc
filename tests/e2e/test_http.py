"""The HTTP API with the real openai client: two engines that share two workers, a Mixtral with random weights."""

import http.client
import itertools
import json
import re
import threading
import time
from typing import Any

import openai
import pytest

from tests.golden import GOLDENS
from tests.serving import Serving

pytestmark = pytest.mark.timeout(600)

ARGS = {
    "model": str(GOLDENS / "mixtral-tiny"),
    "dtype": "float32",
    "workers": 2,
    "engines": 2,
    "engine": {"kv_cache_gib": 0.25},
}
MODEL = "mixtral-tiny"
VOCABULARY = 512
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def server(serving: Serving) -> Serving:
    serving.deploy(ARGS)
    return serving


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def post(server: Serving, path: str, body: Any, raw: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of one POST, without the client's own checks."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        data = json.dumps(body).encode() if raw is None else raw
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def metric(server: Serving, name: str) -> dict[str, float]:
    """A vLLM metric of every engine, by the engine's id."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found: dict[str, float] = {}
    for engine, value in re.findall(rf'^{re.escape(name)}{{.*?engine="([^"]+)"[^}}]*}} (\S+)', text, re.M):
        found[engine] = found.get(engine, 0.0) + float(value)
    assert len(found) == ARGS["engines"], f"{name} is in /metrics for {sorted(found)}"
    return found


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_chat(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 8


def test_streamed_text_equals_the_whole_and_comes_in_pieces(client):
    options = {
        "model": MODEL,
        "prompt": [1, 5, 9],
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**options).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True) if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) >= 20


def test_streamed_chat_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage.completion_tokens == 8


def test_tokens_are_sent_as_they_come(client):
    """A proxy or server that buffers would deliver everything at the end."""
    started_s = time.monotonic()
    times_s = [
        time.monotonic() - started_s
        for _ in client.completions.create(
            model=MODEL, prompt=[1, 2], max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
    ]
    assert times_s[0] < times_s[-1] / 4
    assert max(late - early for early, late in itertools.pairwise(times_s)) < times_s[-1] / 4


def test_logprobs(client):
    answer = client.completions.create(model=MODEL, prompt=[1, 5, 9], max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-5)
        assert chosen <= 0
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=2,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert all(len(token.top_logprobs) == 2 for token in chat.choices[0].logprobs.content)


def test_json_schema_output(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["red", "green"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=200,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"ok", "kind"} and isinstance(value["ok"], bool) and value["kind"] in ("red", "green")


def test_seed_and_n(client):
    options = {"model": MODEL, "prompt": [1, 5], "max_tokens": 8, "temperature": 1.0, "seed": 7, "n": 3}
    first, second = (client.completions.create(**options) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_leaves_stops(server, stream):
    """Without the disconnect fix all of its tokens are computed for nobody."""
    generated = "vllm:generation_tokens_total"
    before = sum(metric(server, generated).values())
    wanted = MAX_MODEL_LEN - 8
    body = {"model": MODEL, "prompt": [1, 2], "max_tokens": wanted, "ignore_eos": True, "n": 16, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    deadline_s = time.monotonic() + 30
    while sum(metric(server, "vllm:num_requests_running").values()) == 0:
        assert time.monotonic() < deadline_s, "the request never ran"
    connection.close()
    while sum(metric(server, "vllm:num_requests_running").values()) > 0:
        assert time.monotonic() < deadline_s, "the request did not stop"
        time.sleep(0.1)
    assert sum(metric(server, generated).values()) - before < 0.9 * 16 * wanted


def test_two_engines_share_the_workers(server):
    """Both engines answer, and both are connected to the same worker."""
    before = metric(server, "vllm:generation_tokens_total")
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 32, "ignore_eos": True}
    threads = [threading.Thread(target=post, args=(server, "/v1/completions", body)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = metric(server, "vllm:generation_tokens_total")
    assert all(after[engine] > before[engine] for engine in after)
    status = server.ask("status")
    assert status["missing_shards"] == []
    assert len(status["table"]["replicas"]) == ARGS["workers"]
    assert sum(source.startswith("engine-") for source in status["progress"]) == ARGS["engines"]


COMPLETION = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 3}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


@pytest.mark.parametrize(
    ("path", "change", "status"),
    [
        ("completions", {"model": "unknown"}, 404),
        ("completions", {"prompt": None}, 400),
        ("completions", {"prompt": []}, 400),
        ("completions", {"prompt": [[]]}, 400),
        ("completions", {"prompt": 5}, 400),
        ("completions", {"prompt": [1, "a"]}, 400),
        ("completions", {"prompt": [1, VOCABULARY]}, 400),
        ("completions", {"prompt": [1, -1]}, 400),
        ("completions", {"prompt": [1, 2**31]}, 400),
        ("completions", {"prompt": [1, 2**63]}, 400),
        ("completions", {"prompt": [1] * (MAX_MODEL_LEN + 1)}, 400),
        ("completions", {"max_tokens": "three"}, 400),
        ("completions", {"max_tokens": -1}, 400),
        ("completions", {"max_tokens": 10**30}, 400),
        ("completions", {"temperature": -1}, 400),
        ("completions", {"temperature": "hot"}, 400),
        ("completions", {"temperature": float("nan")}, 400),
        ("completions", {"temperature": float("inf")}, 400),
        ("completions", {"top_k": 10**20}, 400),
        ("completions", {"seed": 10**30}, 400),
        ("completions", {"n": 0}, 400),
        ("completions", {"n": 10**9}, 400),
        ("completions", {"logprobs": 1000}, 400),
        ("completions", {"logit_bias": {"99999": 1}}, 400),
        ("completions", {"stop_token_ids": [10**30]}, 400),
        ("completions", {"structured_outputs": {"regex": "((("}}, 400),
        ("chat/completions", {"messages": []}, 400),
        ("chat/completions", {"messages": "hello"}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, 400),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400),
        ("embeddings", {}, 404),
        ("nothing", {}, 404),
    ],
)
def test_bad_requests_get_the_right_status_in_openai_shape(server, path, change, status):
    base = CHAT if path.startswith("chat") else COMPLETION
    check_error(post(server, f"/v1/{path}", {**base, **change}), status)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{bad", 400),
        (b"null", 400),
        (b"[1, 2]", 400),
        (b'"text"', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b'{"model": "mixtral-tiny", "prompt": [1], "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b" " * (33 << 20), 413),
    ],
)
def test_bodies_that_are_no_request(server, raw, status):
    check_error(post(server, "/v1/completions", None, raw), status)


def check_error(answer: tuple[int, bytes], status: int) -> None:
    got, body = answer
    assert got == status, body[:300]
    error = json.loads(body)["error"]
    assert error["message"] and error["code"] == status and error["type"]
    assert "Traceback" not in error["message"]


def test_after_all_of_that_the_engines_still_serve(client, server):
    assert len(metric(server, "vllm:num_requests_running")) == ARGS["engines"]
    assert client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=3).choices[0].text is not None


def test_the_openai_client_sees_its_own_exceptions(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="unknown", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[1] * (MAX_MODEL_LEN + 1))

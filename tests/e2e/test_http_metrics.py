"""One scrape covers the whole cluster; what dashboards and alerts use is in it; and nothing of a prompt is anywhere."""

import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.catalogue import METRICS
from ops.energy import Samples, scrape
from ops.observe.alerts import ALERTS
from ops.observe.dashboards import DASHBOARDS, to_grafana
from ops.observe.query import series_in
from tests.otlp import Collector, attributes
from tests.serving import COLLECTOR_PORT, CONSOLE_TOKEN, TWO_ENGINES, Serving, wait_until

pytestmark = pytest.mark.timeout(600)

# Not every machine has RAPL or a GPU; tests/unit/test_energy.py has both, as files and as a fake.
NEEDS_COUNTERS = {"switchyard_energy_joules_total"}
CANARY = "xylophone zebra 7319 marzipan"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def server(serving: Serving) -> Serving:
    serving.deploy(TWO_ENGINES)
    return serving


def send(server: Serving, path: str, body: object) -> tuple[int, bytes, Message]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def complete(server: Serving, **more: object) -> tuple[int, bytes, Message]:
    body = {"model": server.model, "prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "ignore_eos": True, **more}
    return send(server, "/v1/completions", body)


def total(samples: Samples, series: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (name, has), value in samples.items() if name == series and wanted <= set(has))


def scraped_when(server: Serving, condition: Callable[[Samples], str], timeout_s: float = 60.0) -> Samples:
    """Counters reach a scrape within a second or two. `condition` says what is still missing; "" when nothing is."""
    end_s = time.monotonic() + timeout_s
    while missing := condition(samples := scrape(f"{server.url}/metrics")):
        assert time.monotonic() < end_s, missing
        time.sleep(0.2)
    return samples


def unaccounted(samples: Samples) -> str:
    """Engines have sent what workers have received, once nothing is under way and both have reported."""
    sent, received = (total(samples, f"switchyard_{side}messages_total") for side in ("", "worker_"))
    return "" if 0 < sent == received else f"engines have sent {sent} messages, workers have received {received}"


def send_garbage(server: Serving) -> None:
    """To a worker's port, as a port scanner would."""
    endpoint = server.ask("status")["table"]["replicas"][0]["endpoint"]
    with socket.create_connection((endpoint["tcp_host"], endpoint["tcp_port"]), timeout=5) as sock:
        sock.recv(4096)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
        sock.settimeout(5)
        while sock.recv(4096):
            pass


def test_every_series_of_dashboards_and_alerts_is_in_a_scrape(server):
    """And the figures agree: with what was asked for, and between engines and workers."""
    tokens = "vllm:generation_tokens_total"
    before = scraped_when(server, unaccounted)
    assert complete(server)[0] == 200
    with contextlib.suppress(ConnectionResetError):
        send_garbage(server)

    def unsettled(now: Samples) -> str:
        if total(now, "switchyard_worker_rejected_total") == 0:
            return "no worker has rejected the garbage"
        if total(now, tokens) < total(before, tokens) + NUM_TOKENS:
            return "vLLM has not counted all generated tokens"
        if total(now, "switchyard_messages_total") == total(before, "switchyard_messages_total"):
            return "the engine has not counted the messages"
        return unaccounted(now)

    samples = scraped_when(server, unsettled)
    names = {name for name, _ in samples}
    used = {series for alert in ALERTS for series in series_in(alert.expr)}
    used |= {series for dashboard in DASHBOARDS for series in series_in(json.dumps(to_grafana(dashboard)))}
    assert used - names <= NEEDS_COUNTERS
    promised = {series for metric in METRICS for series in metric.series}
    assert promised - names <= NEEDS_COUNTERS
    calls = total(samples, "switchyard_layer_calls_total")
    for histogram in ("dispatch", "wait", "combine"):
        assert total(samples, f"switchyard_{histogram}_seconds_count") == calls
    assert total(samples, "switchyard_replicas", state="online") == TWO_ENGINES["workers"]
    assert total(samples, "switchyard_router_up") == 1 and total(samples, "switchyard_engines_silent") == 0
    computed = total(samples, "switchyard_worker_tokens_total")
    assert 0 < computed <= total(samples, "switchyard_expert_tokens_total")
    assert {labels for name, labels in samples if name == "switchyard_energy_measured"}


def test_labels_are_ids_and_words_and_vllms_engine_is_ours(server):
    engines = {engine["id"] for engine in server.ask("status")["engines"]}
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    known = {metric.name.removesuffix("_total"): set(metric.labels) for metric in METRICS}
    for family in families:
        for sample in family.samples:
            if family.name.startswith("switchyard_"):
                assert set(sample.labels) - {"le"} == known[family.name], sample
            if family.name.startswith("vllm:"):
                assert sample.labels["engine"] in engines, sample


def test_rays_metrics_agent_has_them_too(server):
    """Which is where Ray's service discovery sends Prometheus."""
    port = server.ask("ray_metrics_port")
    end_s = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            text = response.read().decode()
        if re.search(r"^ray_switchyard_layer_calls_total\{.*engine=.*\} [1-9]", text, re.M):
            break
        assert time.monotonic() < end_s, sorted(set(re.findall(r"^ray_switchyard\w+", text, re.M)))
        time.sleep(1)
    assert re.search(r"^ray_switchyard_replicas\{.*state=\"online\".*\} 1", text, re.M)


def test_a_prompt_is_nowhere_but_in_its_answer(server):
    """Logs, metrics and what operators see are searched for the prompt, the answer and their token ids."""
    chat = {"model": server.model, "messages": [{"role": "user", "content": CANARY}], "max_tokens": NUM_TOKENS}
    status, answer, headers = complete(server, prompt=CANARY, echo=True, temperature=0)
    assert status == 200 and CANARY in json.loads(answer)["choices"][0]["text"]
    for name, value in (("Cache-Control", "no-store"), ("X-Robots-Tag", "noindex")):
        assert headers.get_all(name) == [value]
    assert send(server, "/v1/chat/completions", chat)[0] == 200
    assert send(server, "/v1/chat/completions", {**chat, "stream": True})[0] == 200
    refused = [
        send(server, "/v1/chat/completions", {**chat, "messages": [{"role": CANARY, "content": [CANARY, 5]}]}),
        send(server, "/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": f"{CANARY} " * 500}]}),
        send(server, "/v1/completions", {"model": CANARY, "prompt": CANARY}),
        send(server, "/v1/completions", {"model": server.model, "prompt": CANARY, "temperature": CANARY}),
        send(server, "/v1/completions", f'{{"prompt": "{CANARY}'.encode()),
        send(server, f"/v1/{CANARY.replace(' ', '-')}", {"prompt": CANARY}),
    ]
    assert {status for status, _, _ in refused} <= {400, 404, 422}
    assert all(headers["Cache-Control"] == "no-store" for _, _, headers in refused)
    _, tokens, _ = send(server, "/tokenize", {"model": server.model, "prompt": CANARY})
    ids = json.loads(tokens)["tokens"]
    generated = json.loads(answer)["choices"][0]["text"].removeprefix(CANARY)
    secrets = [CANARY, CANARY.split()[0], ", ".join(map(str, ids)), json.dumps(generated)[1:-1]]
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        written = {"/metrics": response.read(), "status": json.dumps(server.ask("status")).encode()}
    written |= console_after_a_chat(server, CANARY)
    written |= {str(path): path.read_bytes() for path in Path(server.ask("logs")).rglob("*") if path.is_file()}
    assert len(written) > 10
    found = [(name, secret) for name, data in written.items() for secret in secrets if secret.encode() in data]
    assert not found


def console_after_a_chat(server: Serving, canary: str) -> dict[str, bytes]:
    """What the console's server tells after somebody has asked for that on its chat page."""
    link = urllib.parse.urlsplit(server.ask("console", args=dict(TWO_ENGINES)))
    console = f"http://{link.netloc}"
    headers = {"Authorization": f"Bearer {CONSOLE_TOKEN}", "Content-Type": "application/json"}
    question = {"mode": "completion", "prompt": canary, "max_tokens": 4}
    chat = urllib.request.Request(f"{console}/api/chat", json.dumps(question).encode(), headers)
    with urllib.request.urlopen(chat, timeout=60) as response:
        assert b"choices" in response.read()
    told = {}
    for path in ("/api/view", "/api/status", "/api/heat", "/api/events?after=0"):
        with urllib.request.urlopen(urllib.request.Request(console + path, headers=headers), timeout=60) as response:
            told[path] = response.read()
    assert all(told.values())
    return told


def test_a_request_that_comes_with_a_trace_is_followed_to_its_layer_calls(server):
    """One trace from HTTP through vLLM to the layer calls; requests without one are not sampled here."""
    trace_id, parent = 0x5EED << 96, 0xCAFE
    prompt = {"model": server.model, "prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace_id:032x}-{parent:016x}-01"}
    traced = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(prompt).encode(), headers)
    with Collector(COLLECTOR_PORT) as collector:
        assert complete(server)[0] == 200
        with urllib.request.urlopen(traced, timeout=60) as response:
            assert response.status == 200
        wait_until(lambda: {"llm_request", "layer call"} <= {span.name for span in collector.spans}, "spans", 30)
    assert {int.from_bytes(span.trace_id) for span in collector.spans} == {trace_id}
    (http,) = [span for span in collector.spans if span.name == "POST /v1/completions"]
    assert int.from_bytes(http.parent_span_id) == parent
    below = [span for span in collector.spans if span is not http]
    assert {span.parent_span_id for span in below} == {http.span_id}
    calls = [attributes(span) for span in below if span.name == "layer call"]
    layers = {call["switchyard.layer"] for call in calls}
    assert layers == set(range(len(layers))) and len(calls) % len(layers) == 0
    assert calls[0]["switchyard.tokens"] == 3 and all(call["switchyard.messages"] >= 1 for call in calls)

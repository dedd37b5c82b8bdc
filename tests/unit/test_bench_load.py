"""The benchmark's client, against a server of a few lines: what it asks for, what it counts, what it refuses."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from ops.bench.load import EventSplitter, LoadError, Workload, run_level

WORKLOAD = Workload(vocab=100, prompt_tokens=4, output_tokens=5)


class Completions(BaseHTTPRequestHandler):
    """Streams max_tokens events, then usage and [DONE]; `mode` says what it does wrong."""

    mode: ClassVar[str] = "right"
    bodies: ClassVar[list[dict[str, Any]]] = []
    running: ClassVar[int] = 0
    most_running: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        with self.lock:
            cls.bodies.append(body)
            cls.running += 1
            cls.most_running = max(cls.most_running, cls.running)
        with contextlib.suppress(ConnectionError):  # the client leaves when another of its streams has failed
            self._answer(body)
        with self.lock:
            cls.running -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        self.send_response(503 if self.mode == "refuse" else 200)
        self.end_headers()
        if self.mode == "refuse":
            self.wfile.write(b"busy")
        else:
            self._stream(body["max_tokens"] - (self.mode == "short"))

    def _stream(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._event({"choices": [{"text": "a"}]})
            time.sleep(0.005)
        if self.mode == "cut":
            return
        self._event({"choices": [], "usage": {"completion_tokens": num_tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, payload: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, type[Completions]]]:
    handler = type("Handler", (Completions,), {"mode": getattr(request, "param", "right"), "bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()
        thread.join()


def test_a_level_sends_every_prompt_once_and_keeps_to_its_streams(server):
    url, handler = server
    run = run_level(url, "m", WORKLOAD, streams=3, num_requests=7)
    assert sorted(body["prompt"] for body in handler.bodies) == sorted(WORKLOAD.prompts(3, 7))
    assert handler.most_running <= 3
    assert len(run.traces) == 7
    assert all(body["ignore_eos"] and body["temperature"] == 0 and body["stream"] for body in handler.bodies)


def test_a_trace_has_one_time_per_token_event(server):
    run = run_level(server[0], "m", WORKLOAD, streams=1, num_requests=1)
    (trace,) = run.traces
    assert trace.num_tokens == 5
    assert 1 <= len(trace.event_s) <= 5  # events may arrive together, usage and [DONE] are not among them
    assert trace.event_s == sorted(trace.event_s)
    assert trace.sent_s < trace.event_s[0]
    assert run.duration_s >= trace.event_s[-1] - trace.sent_s


@pytest.mark.parametrize(
    ("server", "words"),
    [("refuse", "answered 503: busy"), ("short", "asked for 5 tokens, got 4"), ("cut", "ended early")],
    indirect=["server"],
)
def test_what_is_not_a_full_answer_is_an_error(server, words):
    with pytest.raises(LoadError, match=words):
        run_level(server[0], "m", WORKLOAD, streams=2, num_requests=2)


def test_nobody_listening_is_an_error():
    with pytest.raises(LoadError, match="with 2 streams"):
        run_level("http://127.0.0.1:9", "m", WORKLOAD, streams=2, num_requests=2)


def test_events_are_found_wherever_the_chunks_were_cut():
    stream = b'data: {"a": 1}\n\n: comment\n\ndata:{"b": 2}\r\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream)):
        splitter = EventSplitter()
        chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [payload for chunk in chunks for payload in splitter.feed(chunk)] == [
            b'{"a": 1}',
            b'{"b": 2}',
            b"[DONE]",
        ]


def test_prompts_depend_on_seed_and_level_only():
    assert WORKLOAD.prompts(8, 3) == WORKLOAD.prompts(8, 3)
    assert WORKLOAD.prompts(8, 3) != WORKLOAD.prompts(1, 3)
    assert WORKLOAD.prompts(8, 3) != Workload(vocab=100, prompt_tokens=4, seed=1).prompts(8, 3)
    assert all(0 <= token < 100 for prompt in WORKLOAD.prompts(8, 50) for token in prompt)

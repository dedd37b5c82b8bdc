"""Workers come, go and are replaced while people ask: every answer stays the same, and nobody waits for long."""

import http.client
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from itertools import pairwise

import pytest

from tests import golden
from tests.serving import REPLICATED, Serving, wait_until

pytestmark = pytest.mark.timeout(600)

CASE = golden.load("mixtral-tiny")[0]
NUM_TOKENS = 160
SPARE_TAKES_S = 3.0
STREAMS = 4


@dataclass(frozen=True)
class Answer:
    """One streamed answer: its text, piece by piece, and the longest pause between two pieces."""

    pieces: tuple[str, ...]
    longest_gap_s: float


def ask(serving: Serving, num_tokens: int = NUM_TOKENS) -> Answer:
    """A greedy streamed completion. Raises for anything but a complete answer."""
    pieces, times_s = [], []
    with urllib.request.urlopen(completion(serving, num_tokens), timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                times_s.append(time.monotonic())
                event = json.loads(line[6:])
                assert "error" not in event, event
                pieces.append(event["choices"][0]["text"])
    assert line.strip() in (b"data: [DONE]", b"") and len(pieces) == num_tokens
    return Answer(tuple(pieces), max(b - a for a, b in pairwise(times_s)))


def completion(serving: Serving, num_tokens: int, stream: bool = True) -> urllib.request.Request:
    body = {"model": serving.model, "prompt": CASE.prompt, "max_tokens": num_tokens, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True, "stream": stream}).encode()
    return urllib.request.Request(f"{serving.url}/v1/completions", data, {"Content-Type": "application/json"})


class Load:
    """Streams that ask again and again until stopped. An answer that fails ends its stream and is kept as an error."""

    def __init__(self, serving: Serving) -> None:
        self.answers: list[Answer] = []
        self.errors: list[Exception] = []
        self._serving = serving
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.answers.append(ask(self._serving))
        except Exception as error:
            self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def status(serving: Serving) -> dict:
    return serving.ask("control", method="status")


def replicas(serving: Serving, shard: int, role: str = "primary") -> list[dict]:
    found = status(serving)["shards"][shard]["replicas"]
    return [each for each in found if each["state"] == "online" and each["role"] == role]


@pytest.fixture(scope="module")
def undisturbed(replicated: Serving) -> Answer:
    return ask(replicated)


def test_drained_scaled_and_restarted_under_load_nobody_notices(replicated, undisturbed):
    first, second = (each["id"] for each in replicas(replicated, 0))
    (moved, _) = (each["id"] for each in replicas(replicated, 1))
    load = Load(replicated)
    try:
        replicated.ask("control", method="drain", worker=first)
        assert [each["id"] for each in replicas(replicated, 0)] == [second]
        with pytest.raises(RuntimeError, match="the last replica of shard 0"):
            replicated.ask("control", method="drain", worker=second)
        with pytest.raises(RuntimeError, match="there is no worker nobody"):
            replicated.ask("control", method="drain", worker="nobody")
        replicated.ask("control", method="scale", shard=0, replicas=2)
        assert len(replicas(replicated, 0)) == 2
        replicated.ask("control", method="restart", workers=[moved])
        assert len(replicas(replicated, 1)) == 2 and moved not in {each["id"] for each in replicas(replicated, 1)}
        for arguments in ({"shard": 0, "replicas": 0}, {"shard": 9, "replicas": 1}):
            with pytest.raises(RuntimeError):
                replicated.ask("control", method="scale", **arguments)
    finally:
        load.stop()
    assert load.errors == []
    assert len(load.answers) > STREAMS
    assert {answer.pieces for answer in load.answers} == {undisturbed.pieces}
    integrity = replicated.ask("control", method="check_integrity")
    assert len(integrity) == 5 and all(each["ok"] for each in integrity), integrity


def test_a_dead_engine_ends_its_requests_with_an_error_and_is_replaced(replicated, undisturbed):
    """EngineCore is killed: a stream that has begun ends with an error event, another request with 503."""
    import psutil

    (engine,) = status(replicated)["engines"]
    core = next(
        process
        for process in psutil.Process(engine["pid"]).children(recursive=True)
        if process.cmdline() and process.cmdline()[0].startswith("VLLM::EngineCore")
    )
    with urllib.request.urlopen(completion(replicated, 400), timeout=60) as response:
        lines = iter(response)
        assert next(lines).startswith(b"data: {")
        core.kill()
        rest = [line for line in lines if line.strip()]
    assert rest[-1].strip() == b"data: [DONE]"
    error = json.loads(rest[-2].removeprefix(b"data: "))["error"]
    assert error["code"] >= 500 and error["message"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(completion(replicated, 5, stream=False), timeout=60)
    assert refused.value.code == 503 and int(refused.value.headers["Retry-After"]) > 0
    assert json.loads(refused.value.read())["error"]["type"] == "ServiceUnavailableError"
    wait_until(lambda: _answers(replicated), "another engine serves")
    assert ask(replicated).pieces == undisturbed.pieces
    (successor,) = status(replicated)["engines"]
    assert successor["id"] != engine["id"] and successor["state"] == "ready"


def test_a_warm_spare_adopts_a_lost_shard_in_the_middle_of_an_answer(serving):
    serving.deploy({**REPLICATED, "replicas": 1, "spares": 1})
    wait_until(lambda: [s["state"] for s in status(serving)["spares"]] == ["ready"], "the spare is warm")
    undisturbed = ask(serving)
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(ask(serving)))
    epoch = status(serving)["epoch"]
    (victim,) = replicas(serving, 0)
    asking.start()
    os.kill(victim["pid"], signal.SIGKILL)
    asking.join()
    assert answers[0].pieces == undisturbed.pieces
    assert answers[0].longest_gap_s < SPARE_TAKES_S
    assert status(serving)["epoch"] > epoch
    # The worker comes back, and the spare becomes one again.
    wait_until(lambda: len(replicas(serving, 0)) == 1, "Serve has started another worker")
    wait_until(lambda: [s["state"] for s in status(serving)["spares"]] == ["ready"], "the spare is free again")
    assert replicas(serving, 0, role="spare") == []
    assert ask(serving).pieces == undisturbed.pieces
    kinds = [event["kind"] for event in status(serving)["events"]]
    story = ["worker_lost", "shard_missing", "spare_adopting", "shard_back", "spare_released"]
    assert [kind for kind in kinds if kind in story] == story


def _answers(serving: Serving) -> bool:
    host = urllib.parse.urlsplit(serving.url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    request = completion(serving, 2, stream=False)
    connection.request("POST", "/v1/completions", request.data, dict(request.header_items()))
    return connection.getresponse().status == 200

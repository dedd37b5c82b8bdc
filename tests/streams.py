"""Streamed greedy answers, one or many at a time, kept piece by piece."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tests import golden
from tests.serving import Serving

CASE = golden.load("mixtral-tiny")[0]
NUM_TOKENS = 160
STREAMS = 4


@dataclass(frozen=True)
class Answer:
    """One streamed answer: its text, and the longest wait for a piece of it, the first included.

    An engine whose replica gets no core for a while sends what has piled up as one piece, a whole answer even.
    """

    text: str
    longest_gap_s: float


def ask(serving: Serving, num_tokens: int = NUM_TOKENS) -> Answer:
    """A greedy streamed completion. Raises for anything but a complete answer."""
    pieces, times_s = [], [time.monotonic()]
    with urllib.request.urlopen(completion(serving, num_tokens), timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                times_s.append(time.monotonic())
                event = json.loads(line[6:])
                assert "error" not in event, event
                pieces.append(event["choices"][0]["text"])
    assert line.strip() in (b"data: [DONE]", b"") and event["choices"][0]["finish_reason"] == "length"
    return Answer("".join(pieces), max(b - a for a, b in pairwise(times_s)))


def completion(serving: Serving, num_tokens: int, stream: bool = True) -> urllib.request.Request:
    body = {"model": serving.model, "prompt": CASE.prompt, "max_tokens": num_tokens, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True, "stream": stream}).encode()
    return urllib.request.Request(f"{serving.url}/v1/completions", data, {"Content-Type": "application/json"})


class Load:
    """Streams that ask again and again until stopped. An answer that fails ends its stream and is kept as an error."""

    def __init__(self, serving: Serving, streams: int = STREAMS, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` is what each stream's thread does first."""
        self.answers: list[Answer] = []
        self.errors: list[Exception] = []
        self._serving = serving
        self._begin = begin
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(streams)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            self._begin()
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

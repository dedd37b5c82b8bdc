"""Streams that ask again and again while things go wrong, and keep every answer with the moment of every event.

A closed loop like ops/bench/load.py, but it goes on until it is stopped, and a failed request is a result and not the
end. It runs in a thread of its own; nothing is parsed before the load has ended, for the client shares the cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any

import aiohttp

from ops.bench.load import EventSplitter, request_body

_REQUEST_TIMEOUT_S = 120.0
_RETRY_S = 0.25  # after a failed request, as a client with some patience does
_CHECK_S = 0.05


@dataclass
class Answer:
    """One request and what became of it; seconds are monotonic. `error` is empty for a complete answer."""

    prompt: int
    sent_s: float
    event_s: list[float] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    error: str = ""
    is_clean: bool = True
    """Complete, or ended with an error in OpenAI's shape."""
    ended_s: float = 0.0

    def gaps_s(self) -> Iterator[tuple[float, float]]:
        """(end, length) of every time without a token, from sending on."""
        for before, after in zip([self.sent_s, *self.event_s], self.event_s, strict=False):
            yield after, after - before


@dataclass(frozen=True)
class Question:
    """What all streams ask: one prompt after the other, greedy, answers of a fixed length."""

    url: str
    model: str
    prompts: Sequence[list[int]]
    output_tokens: int

    def body(self, prompt: int) -> bytes:
        body = request_body(self.model, self.prompts[prompt], self.output_tokens)
        del body["stream_options"]
        return json.dumps({**body, "return_token_ids": True}).encode()


class FaultLoad:
    """So many streams from entering to leaving the context; `answers` are complete afterwards."""

    def __init__(self, question: Question, streams: int) -> None:
        self._question = question
        self._streams = streams
        self._raw: list[tuple[Answer, list[bytes], int]] = []
        self._num_done = [0] * streams
        self._num_wanted = streams
        self._failure: BaseException | None = None
        self._numbers = count()
        self._thread = threading.Thread(target=self._run, name="fault-load")

    def __enter__(self) -> FaultLoad:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets every stream finish the request it is at."""
        self._num_wanted = 0
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    @property
    def answers(self) -> list[Answer]:
        """In the order in which they ended."""
        return [
            _parsed(answer, payloads, status, self._question.output_tokens) for answer, payloads, status in self._raw
        ]

    def thin_out(self) -> None:
        """Let all streams but the first end with the request that they are at."""
        self._num_wanted = 1

    def wait_answers(self, per_stream: int, timeout_s: float) -> bool:
        """Wait until every stream has ended so many more requests; False if that took too long."""
        goal = [done + per_stream for done in self._num_done]
        deadline_s = time.monotonic() + timeout_s
        while any(done < wanted for done, wanted in zip(self._num_done, goal, strict=True)):
            if time.monotonic() > deadline_s or not self._thread.is_alive():
                return False
            time.sleep(_CHECK_S)
        return True

    def _run(self) -> None:
        try:
            asyncio.run(self._all_streams())
        # Whatever it was, __exit__ raises it in the thread that measures.
        except BaseException as error:
            self._failure = error

    async def _all_streams(self) -> None:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        # One that is kept open may be closed in the moment in which it is used again: each request has its own.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            for stream in range(self._streams):
                group.create_task(self._one_stream(session, stream))

    async def _one_stream(self, session: aiohttp.ClientSession, stream: int) -> None:
        while stream < self._num_wanted:
            answer = Answer(next(self._numbers) % len(self._question.prompts), time.monotonic())
            payloads: list[bytes] = []
            status = await self._ask(session, answer, payloads)
            answer.ended_s = time.monotonic()
            self._raw.append((answer, payloads, status))
            self._num_done[stream] += 1
            if status != 200 or answer.error:
                await asyncio.sleep(_RETRY_S)

    async def _ask(self, session: aiohttp.ClientSession, answer: Answer, payloads: list[bytes]) -> int:
        """Fills `answer` and `payloads`; returns the HTTP status, 0 if there was none."""
        url, body = f"{self._question.url}/v1/completions", self._question.body(answer.prompt)
        status = 0
        try:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                status = response.status
                if status != 200:
                    payloads.append(await response.read())
                    return status
                splitter = EventSplitter()
                async for chunk in response.content.iter_any():
                    now_s = time.monotonic()
                    for payload in splitter.feed(chunk):
                        payloads.append(payload)
                        answer.event_s.append(now_s)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.error, answer.is_clean = f"{type(error).__name__}: {error}", False
        return status


def _parsed(answer: Answer, payloads: Sequence[bytes], status: int, output_tokens: int) -> Answer:
    """The answer with its tokens, or with its error in words."""
    if answer.error:
        return answer
    if status != 200:
        answer.error, answer.is_clean = _error(payloads[0] if payloads else b"", f"HTTP {status}")
        return answer
    if not payloads or payloads[-1] != b"[DONE]":
        answer.error, answer.is_clean = "the stream broke off", False
        return answer
    tokens: list[int] = []
    for payload in payloads[:-1]:
        event = json.loads(payload)
        if "error" in event:
            answer.error, answer.is_clean = _error(payload, "error event")
            return answer
        tokens += event["choices"][0].get("token_ids") or []
    answer.tokens = tuple(tokens)
    if answer.event_s and len(answer.event_s) == len(payloads):
        answer.event_s.pop()  # [DONE] carries no token
    if len(tokens) != output_tokens:
        answer.error, answer.is_clean = f"{len(tokens)} tokens, {output_tokens} were asked for", False
    return answer


def _error(body: bytes, what: str) -> tuple[str, bool]:
    """(words, whether the body is an error in OpenAI's shape)."""
    error: Any = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        if isinstance(error, dict) and error.get("message") and "type" in error and "code" in error:
            return f"{what}: {error['message']}", True
    return f"{what}: {body[:200]!r}", False

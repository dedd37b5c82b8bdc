"""The streaming client that measures an OpenAI server: the same code, in the same process, for both sides.

A level is a closed loop: so many streams, each sending its next request when the last one is complete. Prompts are
random token ids from a seed; answers have a fixed length (ignore_eos), so both sides do the same work. The client
shares the cores with the server, hence its economy: one timestamp per event, and JSON parsed only for the last one.
"""

import asyncio
import gc
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster.errors import SwitchyardError

REQUEST_TIMEOUT_S = 900.0
FIRST_ORDINARY_TOKEN = 8  # below it live the special tokens of most vocabularies


class LoadError(SwitchyardError):
    """The server under measurement refused, broke off or answered something else than was asked for."""


@dataclass(frozen=True)
class Workload:
    """What one request asks for: random prompts from a seed, answers of a fixed length."""

    vocab: int
    prompt_tokens: int = 32
    output_tokens: int = 64
    seed: int = 0

    def prompts(self, streams: int, count: int) -> list[list[int]]:
        """`count` prompts as token ids; the same for equal arguments."""
        rng = random.Random(f"{self.seed}/{streams}")
        first = min(FIRST_ORDINARY_TOKEN, self.vocab - 1)
        return [[rng.randrange(first, self.vocab) for _ in range(self.prompt_tokens)] for _ in range(count)]


@dataclass
class Trace:
    """One request: when it was sent, when each event with tokens came (seconds, monotonic), how many tokens came."""

    sent_s: float
    event_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.event_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive events; the server may put several tokens into one when the client is late."""
        return [later - earlier for earlier, later in zip(self.event_s, self.event_s[1:], strict=False)]


@dataclass(frozen=True)
class LevelRun:
    """One run of one level on one side."""

    streams: int
    duration_s: float
    client_cpu_s: float
    traces: list[Trace]


class EventSplitter:
    """Splits the bytes of a text/event-stream into the payloads of its `data:` lines, wherever the chunks were cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The payloads completed by this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def request_body(model: str, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    """A greedy completion request of fixed length, streamed, that ends with a usage event."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _stream(session: aiohttp.ClientSession, url: str, body: bytes) -> Trace:
    trace = Trace(sent_s=time.monotonic())
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        if response.status != 200:
            raise LoadError(f"{url} answered {response.status}: {(await response.text())[:500]}")
        splitter = EventSplitter()
        last = previous = b""
        async for chunk in response.content.iter_any():
            now_s = time.monotonic()
            for payload in splitter.feed(chunk):
                trace.event_s.append(now_s)
                last, previous = payload, last
    if last != b"[DONE]" or len(trace.event_s) < 3:
        raise LoadError(f"{url}: the stream ended early, with {previous[:500]!r} and {last[:500]!r}")
    del trace.event_s[-2:]  # usage and [DONE] carry no tokens
    trace.num_tokens = _completion_tokens(url, previous)
    return trace


def _completion_tokens(url: str, payload: bytes) -> int:
    try:
        return int(json.loads(payload)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{url}: no usage before the end of the stream, but {payload[:500]!r}") from error


async def _level(base_url: str, model: str, workload: Workload, streams: int, num_requests: int) -> list[Trace]:
    url = base_url + "/v1/completions"
    bodies = iter(
        [
            json.dumps(request_body(model, prompt, workload.output_tokens)).encode()
            for prompt in workload.prompts(streams, num_requests)
        ]
    )
    traces: list[Trace] = []

    async def one_stream(session: aiohttp.ClientSession) -> None:
        for body in bodies:  # one iterator for all streams: each takes the next request
            traces.append(await _stream(session, url, body))

    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(one_stream(session))
    return traces


def run_level(base_url: str, model: str, workload: Workload, streams: int, num_requests: int) -> LevelRun:
    """Measure one level. Raises LoadError when any request fails or comes back with another length."""
    gc.collect()
    gc.disable()
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    try:
        traces = asyncio.run(_level(base_url, model, workload, streams, num_requests))
    except* (aiohttp.ClientError, TimeoutError, OSError) as group:
        raise LoadError(f"{base_url}: {_first(group)!r} with {streams} streams") from group
    except* LoadError as group:
        raise _first(group) from None
    finally:
        gc.enable()
    ended_s = max(trace.event_s[-1] for trace in traces)
    wrong = [trace.num_tokens for trace in traces if trace.num_tokens != workload.output_tokens]
    if wrong:
        raise LoadError(f"{base_url}: asked for {workload.output_tokens} tokens, got {wrong[0]}")
    return LevelRun(streams, ended_s - started_s, time.process_time() - started_cpu_s, traces)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

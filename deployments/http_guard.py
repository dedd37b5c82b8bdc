"""ASGI middleware between Serve and vLLM's app: what vLLM's own server would have seen, and answers of one shape.

``DisconnectOnCancel``: Serve cancels a request's task when its client leaves; vLLM wants to be told by an
http.disconnect message and otherwise goes on computing for nobody. So the app runs in a task of its own, and a
cancellation becomes that message.

``OpenAIErrors``: bodies that are too large or hold integers that no field can take are refused before vLLM sees them,
and every error has OpenAI's shape, also those that come from FastAPI itself ({"detail": ..}) or have no JSON at all.
Once the engine is dead its errors are 503 with Retry-After: Serve is about to start another.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

MAX_BODY_BYTES = 32 << 20
_LEAVE_LIMIT_S = 10.0
_RETRY_AFTER_S = 10
# vLLM hands numbers to its engine as 64-bit integers. A cheap look first, because almost no body has such a number.
_LONG_INTEGER = re.compile(rb"\d{19,}")
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


class DisconnectOnCancel:
    """Tells the app that the client has left when the task that serves the request is cancelled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = asyncio.Event()
        task = asyncio.ensure_future(self._app(scope, _until(left, receive), _unless(left, send)))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            left.set()
            await _finish(task)
            raise


def _until(left: asyncio.Event, receive: Receive) -> Receive:
    """`receive` that answers http.disconnect once the client has left."""

    async def wrapped() -> Message:
        if left.is_set():
            return {"type": "http.disconnect"}
        message = asyncio.ensure_future(receive())
        gone = asyncio.ensure_future(left.wait())
        try:
            await asyncio.wait({message, gone}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() and not message.cancelled() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            gone.cancel()

    return wrapped


def _unless(left: asyncio.Event, send: Send) -> Send:
    """`send` that drops everything once the client has left."""

    async def wrapped(message: Message) -> None:
        if not left.is_set():
            await send(message)

    return wrapped


async def _finish(task: "asyncio.Future[None]") -> None:
    """Give the app time to clean up; cancel it if it does not."""
    done, _ = await asyncio.wait({task}, timeout=_LEAVE_LIMIT_S)
    if not done:
        logger.warning("a request did not end %.0f s after its client left; cancelling it", _LEAVE_LIMIT_S)
        task.cancel()
    elif not task.cancelled() and task.exception() is not None:
        logger.debug("a request whose client left ended with %r", task.exception())


class OpenAIErrors:
    """Refuses bodies that cannot be served, and gives every error response OpenAI's shape.

    `is_engine_dead` is asked when a response is an error of the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_engine_dead: Callable[[], bool] = lambda: False,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app = app
        self._is_engine_dead = is_engine_dead
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            messages = await _read_body(receive, self._max_body_bytes)
            if messages is None:
                text = f"The request's body is larger than {self._max_body_bytes} bytes."
                await send_error(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
                return
            number = out_of_range_integer(b"".join(message.get("body", b"") for message in messages))
            if number is not None:
                text = f"{str(number)[:40]} is outside the range of 64-bit integers."
                await send_error(send, HTTPStatus.BAD_REQUEST, text)
                return
            receive = _replay(messages, receive)
        await self._app(scope, receive, _Shaper(send, self._is_engine_dead))


class _Shaper:
    """A `send` that holds error responses back until they are complete, and rewrites them where they need it."""

    def __init__(self, send: Send, is_engine_dead: Callable[[], bool]) -> None:
        self._send = send
        self._is_engine_dead = is_engine_dead
        self._held: list[Message] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._held.append(message)
        elif not self._held:
            await self._send(message)
        else:
            self._held.append(message)
            if not message.get("more_body", False):
                await self._release()

    async def _release(self) -> None:
        start, *parts = self._held
        self._held = []
        if start["status"] == HTTPStatus.INTERNAL_SERVER_ERROR and self._is_engine_dead():
            text = "The engine has stopped; another is starting."
            await send_error(self._send, HTTPStatus.SERVICE_UNAVAILABLE, text)
            return
        words = error_text(b"".join(part.get("body", b"") for part in parts), start["status"])
        if words is not None:
            await send_error(self._send, HTTPStatus(start["status"]), words)
            return
        for message in (start, *parts):
            await self._send(message)


def error_text(body: bytes, status: int) -> str | None:
    """None when `body` is an error in OpenAI's shape already; else the words to put into one."""
    try:
        content = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()[:500] or HTTPStatus(status).phrase
    if not isinstance(content, dict) or "error" not in content:
        detail = content.get("detail") if isinstance(content, dict) else content
        return detail if isinstance(detail, str) else json.dumps(detail)
    error = content["error"]
    has_words = not isinstance(error, dict) or error.get("message")
    return None if has_words else HTTPStatus(status).phrase


def out_of_range_integer(body: bytes) -> int | None:
    """The first integer of a JSON body that does not fit into 64 bits; None also for bodies that are no JSON."""
    if not _LONG_INTEGER.search(body):
        return None
    try:
        return next(_too_big(json.loads(body)), None)
    except (ValueError, RecursionError):
        return None


def _too_big(value: Any) -> Iterator[int]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, int) and not _LEAST <= item <= _MOST:
            yield item


async def _read_body(receive: Receive, max_bytes: int) -> list[Message] | None:
    """All messages up to the end of the body (or the client's leaving); None when it is too large."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if size > max_bytes:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    pending = list(messages)

    async def wrapped() -> Message:
        return pending.pop(0) if pending else await receive()

    return wrapped


def error_body(status: HTTPStatus, text: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    words = status.phrase.replace("-", " ").split()
    kind = "".join(word.capitalize() for word in words).removesuffix("Error") + "Error"
    return {"error": {"message": text, "type": kind, "param": None, "code": status.value}}


async def send_error(
    send: Send, status: HTTPStatus, text: str, more_headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A complete response in the shape of OpenAI's errors."""
    body = json.dumps(error_body(status, text)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += more_headers
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(_RETRY_AFTER_S).encode()))
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body})

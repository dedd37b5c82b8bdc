"""ASGI middleware that shows the attribution that a model's licence asks for.

Every response carries it in the header ``x-model-attribution``, and every model of /v1/models as ``attribution``.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-model-attribution"
FIELD = "attribution"


class Attributed:
    """Adds `attribution` to the responses of `app`; None adds nothing."""

    def __init__(self, app: ASGIApp, attribution: str | None) -> None:
        self._app = app
        self._attribution = attribution

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._attribution is None:
            await self._app(scope, receive, send)
            return
        lists_models = scope["method"] == "GET" and scope["path"].rstrip("/").endswith("/v1/models")
        with_header = _WithHeader(send, self._attribution)
        await self._app(scope, receive, _ModelList(with_header, self._attribution) if lists_models else with_header)


class _WithHeader:
    def __init__(self, send: Send, attribution: str) -> None:
        self._send = send
        self._header = (HEADER.encode(), attribution.encode("latin-1"))

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        await self._send(message)


class _ModelList:
    """A `send` that holds the list of models back until it is complete, and adds the field to every model."""

    def __init__(self, send: Send, attribution: str) -> None:
        self._send = send
        self._attribution = attribution
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        start, self._start = self._start, None
        body = with_attribution(self._body, self._attribution)
        others = [(name, value) for name, value in start.get("headers", ()) if name.lower() != b"content-length"]
        headers = [*others, (b"content-length", str(len(body)).encode())]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def with_attribution(body: bytes, attribution: str) -> bytes:
    """OpenAI's list of models with the field in each of them; a body of another shape as it is."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        return body
    models = content.get("data") if isinstance(content, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        return body
    content["data"] = [{**model, FIELD: attribution} for model in models]
    return json.dumps(content).encode()

"""ASGI middleware that asks for an API key, and an engine's end of the gatekeeper.

It stands before everything that reads a body, knows a route or asks a model. Whoever has no valid key gets 401, always
the same and at the price of one hash, whatever the path and whatever was wrong. Only GET /health needs no key. The key
goes no further than here: the headers that carried it are not handed on.
"""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api_keys import CREDENTIAL_HEADERS, KeyRecord, KeyRing, presented_key
from cluster.limits import Limiter, share_of
from deployments.http_guard import send_error
from deployments.prompt_log import Overheard

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

NO_KEY = "A valid API key is needed: send it as `Authorization: Bearer KEY`."
NOT_YET = "The API keys are not known yet. Try again."
TOO_MANY = "Too many requests for this API key. Try again later."

_ASK_LIMIT_S = 1.0
_RETRY_S = 1.0
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class Gate:
    """Which keys are valid, and whether one of them may be served now. Belongs to the event loop."""

    def __init__(self, gatekeeper: "DeploymentHandle", engine_id: str, num_engines: int) -> None:
        self._gatekeeper = gatekeeper
        self._engine_id = engine_id
        self._num_engines = num_engines
        self._version = ""
        self._leases: set[str] = set()
        self._alone = Limiter()
        self.ring: KeyRing | None = None
        self._following = asyncio.create_task(self._follow())

    @property
    def is_broken(self) -> bool:
        return self._following.done()

    def close(self) -> None:
        self._following.cancel()

    async def admit(self, key: KeyRecord, lease: str) -> float:
        """0.0, or the seconds after which to try again. Asks the gatekeeper for a key with limits only."""
        if not key.is_limited:
            return 0.0
        self._leases.add(lease)
        try:
            answer = self._gatekeeper.admit.remote(self._engine_id, key.id, lease)
            wait_s = float(await asyncio.wait_for(answer, _ASK_LIMIT_S))
        # Ray raises many kinds while the gatekeeper restarts: its share of the limits is this engine's to keep then.
        except Exception as error:
            logger.warning("no answer from the gatekeeper: %s", error)
            wait_s = self._alone.admit(share_of(key, self._num_engines), self._engine_id, lease, time.monotonic())
        if wait_s:
            self._leases.discard(lease)
        return wait_s

    def release(self, lease: str) -> None:
        """A request that was admitted has ended."""
        if lease in self._leases:
            self._leases.discard(lease)
            self._alone.release(self._engine_id, lease)
            self._gatekeeper.release.remote(self._engine_id, lease)

    async def _follow(self) -> None:
        while True:
            try:
                news = await self._gatekeeper.follow.remote(self._engine_id, self._version, list(self._leases))
            # Ray raises many kinds while the gatekeeper restarts.
            except Exception as error:
                logger.warning("no news from the gatekeeper: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            if news is not None:
                self._version, text = news
                self.ring = KeyRing.from_json(text)


class Authorised:
    """Serves with `app` those requests that `gate` lets in."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_health_check(scope):
            await self._app(scope, receive, send)
            return
        ring = self._gate.ring
        if ring is None:
            await _refuse(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, NOT_YET)
            return
        key = ring.find(presented_key(scope["headers"]), time.time())
        if key is None:
            await _refuse(scope, send, HTTPStatus.UNAUTHORIZED, NO_KEY, (b"www-authenticate", b"Bearer"))
            return
        await self._serve(key, scope, receive, send)

    async def _serve(self, key: KeyRecord, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lease() as lease:
            wait_s = await self._gate.admit(key, lease)
            if wait_s:
                retry_after = (b"retry-after", str(math.ceil(wait_s)).encode())
                await _refuse(scope, send, HTTPStatus.TOO_MANY_REQUESTS, TOO_MANY, retry_after)
                return
            headers = [each for each in scope["headers"] if each[0].lower() not in CREDENTIAL_HEADERS]
            app = Overheard(self._app, key.name) if key.log_prompts else self._app
            await app({**scope, "headers": headers}, receive, send)

    @contextlib.contextmanager
    def _lease(self) -> Iterator[str]:
        lease = uuid.uuid4().hex
        try:
            yield lease
        finally:
            self._gate.release(lease)


def _is_health_check(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) == "/health"


async def _refuse(scope: Scope, send: Send, status: HTTPStatus, text: str, *headers: tuple[bytes, bytes]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
    else:
        await send_error(send, status, text, headers)

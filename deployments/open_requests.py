"""ASGI middleware that knows how many requests are being answered, so that a process can end between two of them."""

import asyncio
import time

from starlette.types import ASGIApp, Receive, Scope, Send


class OpenRequests:
    """Counts the requests of `app`, all in one event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._count = 0
        self._changed_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._change(1)
        try:
            await self._app(scope, receive, send)
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._count += by
        self._changed_s = time.monotonic()

    async def wait_for_quiet(self, quiet_s: float, limit_s: float) -> bool:
        """Until none has been open for `quiet_s`, in which the last answer gets out; False if `limit_s` was too short.

        Serve's HTTP server runs in another thread than the app, and has an answer a moment longer.
        """
        end_s = time.monotonic() + limit_s
        while (now_s := time.monotonic()) < end_s:
            if self._count == 0 and now_s - self._changed_s >= quiet_s:
                return True
            await asyncio.sleep(quiet_s / 4)
        return False

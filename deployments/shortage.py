"""ASGI middleware for the time in which experts are gone: requests get 503 instead of waiting for ever.

vLLM knows no forward step that fails and lets the engine live, so a step without experts waits for their return. Once
it has waited for expert_timeout_s, every request in flight is ended here with 503 and Retry-After (a stream that has
begun, with an error event), vLLM is told that its client has left, and new requests are refused until the step goes on.
"""

import asyncio
import json
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http_guard import DisconnectOnCancel, error_body, send_error

TEXT = "The experts of this model are unavailable at the moment; their workers are being restarted."


class Shortage:
    """Whether layer calls stall. set() may be called from any thread, the rest from the event loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begun = asyncio.Event()

    def set(self, is_stalled: bool) -> None:
        self._loop.call_soon_threadsafe(self._begun.set if is_stalled else self._begun.clear)

    @property
    def is_on(self) -> bool:
        return self._begun.is_set()

    async def wait(self) -> None:
        """Until a shortage begins."""
        await self._begun.wait()


class EndInShortage:
    """Ends the POST requests of `app` when a shortage begins, and refuses new ones while it lasts."""

    def __init__(self, app: ASGIApp, shortage: Shortage) -> None:
        self._app = DisconnectOnCancel(app)
        self._shortage = shortage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        if not self._shortage.is_on and await self._was_served(scope, receive, response):
            return
        await response.end_with_error()

    async def _was_served(self, scope: Scope, receive: Receive, response: "_Response") -> bool:
        request = asyncio.ensure_future(self._app(scope, receive, response.send))
        shortage = asyncio.ensure_future(self._shortage.wait())
        try:
            await asyncio.wait({request, shortage}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                request.result()
                return True
            response.is_cut = True
            return False
        finally:
            shortage.cancel()
            if not request.done():
                request.cancel()
                await asyncio.wait({request})


class _Response:
    """What has been sent of a response, so that it can be ended properly at any point."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self._is_complete = False
        self.is_cut = False

    async def send(self, message: Message) -> None:
        if self.is_cut:
            return
        self._has_begun = self._has_begun or message["type"] == "http.response.start"
        if message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    async def end_with_error(self) -> None:
        """503 where nothing was sent yet, else an error event in the stream."""
        if not self._has_begun:
            await send_error(self._send, HTTPStatus.SERVICE_UNAVAILABLE, TEXT)
        elif not self._is_complete:
            error = json.dumps(error_body(HTTPStatus.SERVICE_UNAVAILABLE, TEXT))
            await self._send({"type": "http.response.body", "body": f"data: {error}\n\ndata: [DONE]\n\n".encode()})

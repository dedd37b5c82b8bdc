"""Prompts and answers are their authors' alone: no cache or search engine keeps them, and no core file."""

import resource

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = ((b"cache-control", b"no-store"), (b"x-robots-tag", b"noindex"))


def forbid_core_dumps() -> None:
    """This process and those that it will start leave no core file, in which prompts would be found."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Private:
    """ASGI middleware. Adds HEADERS to every response of `app`, in place of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in HEADERS}
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names]
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)

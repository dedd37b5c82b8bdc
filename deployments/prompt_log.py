"""ASGI middleware that logs what one API key's requests ask and are answered, for whoever has asked for that.

Off for every key unless `switchyard keys add NAME --log-prompts` or `switchyard keys log-prompts NAME on` said so.
"""

import json
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

_MAX_BYTES = 1 << 16  # of a request and of an answer; what is longer is cut off there


class Overheard:
    """Serves with `app`, and logs one line of JSON for every request when it has ended."""

    def __init__(self, app: ASGIApp, key_name: str) -> None:
        self._app = app
        self._key_name = key_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, answered = bytearray(), bytearray()

        async def listening() -> Message:
            message = await receive()
            asked.extend(message.get("body", b"")[: _MAX_BYTES - len(asked)])
            return message

        async def speaking(message: Message) -> None:
            answered.extend(message.get("body", b"")[: _MAX_BYTES - len(answered)])
            await send(message)

        try:
            await self._app(scope, listening, speaking)
        finally:
            if asked or answered:
                line = {
                    "key": self._key_name,
                    "path": scope["path"],
                    "asked": asked.decode("utf-8", "replace"),
                    "answered": answered.decode("utf-8", "replace"),
                }
                logger.info("prompt log: %s", json.dumps(line, ensure_ascii=False))

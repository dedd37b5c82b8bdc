"""vLLM's engine client with two holes closed. Imports vllm at the top: import this module late."""

import asyncio
import contextlib
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError


class Engine(AsyncLLM):
    """AsyncLLM whose requests also stop when they are cancelled while they are being added.

    vLLM 0.32 aborts a cancelled request only once add_request has returned. With n > 1 that call adds one request after
    another; cancelled in between, those already added would run to their end for nobody.
    """

    async def add_request(self, *args: Any, **kwargs: Any) -> Any:
        adding = asyncio.ensure_future(super().add_request(*args, **kwargs))
        try:
            return await asyncio.shield(adding)
        except asyncio.CancelledError:
            # A request that could not be added has nothing to abort.
            with contextlib.suppress(Exception):
                await self.abort((await adding).request_id, internal=True)
            raise

    def fail_open_requests(self) -> None:
        """End every request with EngineDeadError once the engine is dead.

        vLLM 0.32 does so when the engine says that it dies, or its socket breaks; when EngineCore gives up after one of
        its workers has died, requests in flight would wait for ever.
        """
        self.output_processor.propagate_error(EngineDeadError())

"""The gatekeeper: reads the file of API keys on the head node, and keeps the account of their limits for all engines.

One replica, and only where API keys are asked for. Engines check keys themselves, against the ring that they get from
here; they ask here before they serve a key that has limits. Without a gatekeeper (it is being restarted) they go on
with the ring they have, each with its share of the limits.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.api_keys import KeyRing, read_ring
from cluster.config import parse_settings
from cluster.errors import ConfigError
from cluster.limits import Limiter

logger = logging.getLogger("ray.serve")

_LOOK_EVERY_S = 0.5
_LONG_POLL_S = 1.0


class Gatekeeper:
    """The Serve deployment."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = parse_settings(args)
        assert settings.api_keys is not None, "build_app starts a gatekeeper for a file of keys only"
        self._file = Path(settings.api_keys)
        self._limiter = Limiter()
        self._changed = asyncio.Condition()
        self._take(read_ring(self._file))
        self._watching = asyncio.create_task(self._watch())

    async def follow(self, engine_id: str, known: str, open_leases: Sequence[str]) -> tuple[str, str] | None:
        """(version, KeyRing as JSON) as soon as the version is not `known`; None after a second. Renews the leases."""
        self._limiter.renew(engine_id, set(open_leases), time.monotonic())
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version != known), _LONG_POLL_S)
        return (self._version, self._text) if self._version != known else None

    async def admit(self, engine_id: str, key_id: str, lease_id: str) -> float:
        """0.0 with a lease, or the seconds after which asking again makes sense. Counts over all engines."""
        record = self._records.get(key_id)
        return self._limiter.admit(record, engine_id, lease_id, time.monotonic()) if record is not None else 0.0

    async def release(self, engine_id: str, lease_id: str) -> None:
        """A request has ended."""
        self._limiter.release(engine_id, lease_id)

    async def check_health(self) -> None:
        if self._watching.done():
            raise RuntimeError("the gatekeeper does not watch its file any more")

    def _take(self, ring: KeyRing) -> None:
        self._text = ring.to_json()
        self._version = hashlib.sha256(self._text.encode()).hexdigest()
        self._records = {record.id: record for record in ring.records}

    async def _watch(self) -> None:
        complaint = ""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                ring = await asyncio.to_thread(read_ring, self._file)
            except ConfigError as error:  # being replaced, or damaged: the keys stay as they are
                if str(error) != complaint:
                    complaint = str(error)
                    logger.error("the API keys stay as they were: %s", complaint)
                continue
            complaint = ""
            if ring.to_json() != self._text:
                self._take(ring)
                logger.info("API keys: %d, changed", len(ring.records))
                async with self._changed:
                    self._changed.notify_all()

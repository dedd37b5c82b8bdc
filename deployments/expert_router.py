"""The expert router: owns the routing table and the cluster's secret. No token ever passes through it.

Workers register and send heartbeats; engines wait for tables newer than the one they know. When the router dies, tables
stay as they are; the new router starts with a larger epoch and the workers register again.
"""

import asyncio
import os
import time
from typing import Any

from ray.experimental import internal_kv

from cluster.config import parse_settings
from cluster.membership import Membership
from cluster.placement import partition
from cluster.routing import Replica, RoutingTable

_SECRET_KEY = b"switchyard:data-plane-secret"
_EXPIRE_EVERY_S = 0.5
_LONG_POLL_S = 20.0


class ExpertRouter:
    """One replica per application. Method arguments and results travel by Ray, not by the data plane."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict[str, Any], model_fingerprint: str, num_layers: int, num_experts: int
    ) -> None:
        settings = parse_settings(args)
        shards = partition(num_layers, num_experts, settings.workers)
        # Wall-clock milliseconds: a restarted router never reuses an epoch that engines have already seen.
        epoch = int(time.time() * 1000)
        table = RoutingTable(epoch, model_fingerprint, num_layers, num_experts, shards, ())
        self._membership = Membership(table, settings.worker_lost_after_s)
        self._changed = asyncio.Condition()
        self._secret = _shared_secret()
        self._progress: dict[str, str] = {}
        self._expiry = asyncio.create_task(self._expire_silent_workers())

    async def secret(self) -> bytes:
        """The 32 random bytes that prove membership on the data plane."""
        return self._secret

    async def register(self, replica: Replica, model_fingerprint: str) -> None:
        """A worker is ready to serve. Raises ConfigError when it holds another model."""
        self._membership.register(replica, model_fingerprint, time.monotonic())
        await self._notify()

    async def heartbeat(self, replica_id: str) -> bool:
        """False: the router does not know the worker (any more); it must register again."""
        return self._membership.heartbeat(replica_id, time.monotonic())

    async def drain(self, replica_id: str) -> None:
        self._membership.drain(replica_id)
        await self._notify()

    async def leave(self, replica_id: str) -> None:
        self._membership.leave(replica_id)
        await self._notify()

    async def wait_for_table(self, known_epoch: int) -> dict[str, Any] | None:
        """The table as JSON as soon as it is newer than `known_epoch` and was complete once; None after 20 s."""

        def is_news() -> bool:
            return self._membership.table.epoch > known_epoch and (
                known_epoch > 0 or not self._membership.missing_shards
            )

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(is_news), _LONG_POLL_S)
            except TimeoutError:
                return None
            return self._membership.table.to_json()

    async def report(self, source: str, stage: str) -> None:
        """`source` (a worker or an engine) says in a few words what it is doing."""
        self._progress[source] = stage

    async def status(self) -> dict[str, Any]:
        """What people and tests want to see: progress by source, the table, and shards without a worker."""
        return {
            "progress": dict(self._progress),
            "table": self._membership.table.to_json(),
            "missing_shards": list(self._membership.missing_shards),
        }

    async def check_health(self) -> None:
        if self._expiry.done():
            raise RuntimeError("the expert router's expiry task has ended")

    async def _expire_silent_workers(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            if self._membership.expire(time.monotonic()):
                await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _shared_secret() -> bytes:
    """Drawn once per Ray cluster and kept in its key-value store, so that it outlives the router."""
    internal_kv._internal_kv_put(_SECRET_KEY, os.urandom(32), overwrite=False)
    secret = internal_kv._internal_kv_get(_SECRET_KEY)
    assert isinstance(secret, bytes) and len(secret) == 32
    return secret

"""Rate and concurrency of API keys, counted in one place for all engines. Decisions only; the clock is an argument.

A key's rate is a token bucket that holds a minute's worth of requests and refills evenly. A request that is being
served is a lease; engines say every second which of theirs are open, so that none outlives a lost message or engine.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from cluster.api_keys import KeyRecord

RETRY_CONCURRENT_S = 1.0
SILENT_ENGINE_S = 10.0
# A lease that was granted while its engine's report was on the way is not in that report yet.
_SETTLED_S = 3.0


@dataclass
class _Bucket:
    tokens: float
    filled_s: float


@dataclass
class _Engine:
    seen_s: float
    leases: dict[str, tuple[str, float]] = field(default_factory=dict)  # lease id -> key id, granted


class Limiter:
    """Who may be served now."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._engines: dict[str, _Engine] = {}

    def admit(self, key: KeyRecord, engine_id: str, lease_id: str, now_s: float) -> float:
        """0.0 and a lease; or the seconds after which asking again makes sense, and none."""
        if key.concurrent is not None and self.open_leases(key.id) >= key.concurrent:
            return RETRY_CONCURRENT_S
        wait_s = self._take(key, now_s)
        if not wait_s:
            self._engine(engine_id, now_s).leases[lease_id] = (key.id, now_s)
        return wait_s

    def _take(self, key: KeyRecord, now_s: float) -> float:
        if key.requests_per_minute is None:
            return 0.0
        bucket = self._buckets.setdefault(key.id, _Bucket(key.requests_per_minute, now_s))
        per_s = key.requests_per_minute / 60
        refilled = bucket.tokens + max(now_s - bucket.filled_s, 0.0) * per_s
        bucket.tokens, bucket.filled_s = min(refilled, float(key.requests_per_minute)), now_s
        if bucket.tokens < 1:
            return (1 - bucket.tokens) / per_s
        bucket.tokens -= 1
        return 0.0

    def release(self, engine_id: str, lease_id: str) -> None:
        """A request has ended."""
        if engine_id in self._engines:
            self._engines[engine_id].leases.pop(lease_id, None)

    def renew(self, engine_id: str, open_ids: Collection[str], now_s: float) -> None:
        """What an engine says it is serving; leases that it has forgotten, and those of silent engines, end."""
        engine = self._engine(engine_id, now_s)
        engine.seen_s = now_s
        engine.leases = {
            lease: (key_id, granted_s)
            for lease, (key_id, granted_s) in engine.leases.items()
            if lease in open_ids or now_s - granted_s < _SETTLED_S
        }
        for silent in [name for name, each in self._engines.items() if now_s - each.seen_s > SILENT_ENGINE_S]:
            del self._engines[silent]

    def open_leases(self, key_id: str) -> int:
        """Requests of a key that are being served, over all engines."""
        return sum(held == key_id for engine in self._engines.values() for held, _ in engine.leases.values())

    def _engine(self, engine_id: str, now_s: float) -> _Engine:
        return self._engines.setdefault(engine_id, _Engine(now_s))


def share_of(key: KeyRecord, num_engines: int) -> KeyRecord:
    """The key with an engine's share of its limits, at least 1: for the time without a common account."""

    def part(limit: int | None) -> int | None:
        return None if limit is None else max(1, math.floor(limit / num_engines))

    return replace(key, requests_per_minute=part(key.requests_per_minute), concurrent=part(key.concurrent))

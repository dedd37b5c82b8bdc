"""How often, and for how long, shards have been without a worker. The clock is an argument."""

from __future__ import annotations


class Outages:
    """begin() and end() alternate for each shard."""

    def __init__(self) -> None:
        self._ended: dict[int, tuple[int, float]] = {}  # by shard: outages begun, seconds of those that are over
        self._since_s: dict[int, float] = {}

    def begin(self, shard_id: int, now_s: float) -> None:
        """The shard has lost its last worker."""
        count, seconds = self._ended.get(shard_id, (0, 0.0))
        self._ended[shard_id] = (count + 1, seconds)
        self._since_s[shard_id] = now_s

    def end(self, shard_id: int, now_s: float) -> None:
        """It is served again."""
        count, seconds = self._ended[shard_id]
        self._ended[shard_id] = (count, seconds + now_s - self._since_s.pop(shard_id))

    def totals(self, now_s: float) -> dict[int, tuple[int, float]]:
        """{shard: (outages so far, seconds so far)}; the one that lasts counts too."""
        return {
            shard_id: (count, seconds + now_s - self._since_s.get(shard_id, now_s))
            for shard_id, (count, seconds) in self._ended.items()
        }

"""Who accuses which replica of what, and what follows from all of it: pure; the clock is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from cluster.blame import Cause

_KEPT_S = 60.0
_MAX_KEPT = 10_000
# So many accusations within that time, and the replica has to go. Silence is judged by the worker's own parent.
_CONDEMNED_BY = {
    Cause.REFUSED: 1,
    Cause.WRONG_SECRET: 1,
    Cause.UNREACHABLE: 3,
    Cause.MALFORMED: 3,
    Cause.NOT_FINITE: 3,
    Cause.FAILED: 5,
}
# Whom these are true of serves nobody, not even for want of a better one.
USELESS = frozenset({Cause.REFUSED, Cause.WRONG_SECRET, Cause.UNREACHABLE})


class Accusations:
    """Those of the last minute, by all engines."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, str, str, Cause]] = deque(maxlen=_MAX_KEPT)

    def add(self, engine_id: str, replica_id: str, cause: Cause, now_s: float) -> int:
        """Keep one; returns how many of that cause the replica has now."""
        kept = self._kept
        kept.append((now_s, engine_id, replica_id, cause))
        while now_s - kept[0][0] > _KEPT_S:
            kept.popleft()
        return sum(name == replica_id and why is cause for _, _, name, why in kept)

    def is_engines_fault(self, engine_id: str, cause: Cause, present: Collection[str]) -> bool:
        """Whether one engine alone accuses more than half of the replicas that are `present`, of three or more."""
        accused = {name for _, engine, name, why in self._kept if engine == engine_id and why is cause}
        others = {engine for _, engine, _, why in self._kept if why is cause} - {engine_id}
        return len(present) > 2 and not others and 2 * len(accused.intersection(present)) > len(present)


def condemns(cause: Cause, count: int) -> bool:
    """Whether so many accusations are enough."""
    return cause in _CONDEMNED_BY and count >= _CONDEMNED_BY[cause]

"""Which experts were busy, and when: totals of layer x expert remembered for a while. Pure."""

from collections import deque
from typing import Any

import numpy as np

KEEP_S = 900.0
_EVERY_S = 5.0


class Heat:
    """Totals as they were every few seconds; LE is [layer, expert]."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, np.ndarray]] = deque()
        self._before: tuple[float, np.ndarray] | None = None  # the last but one, for what is live
        self._last: tuple[float, np.ndarray] | None = None

    def add(self, now_s: float, total: list[list[int]]) -> None:
        """A router that was restarted counts from zero: what was known is forgotten."""
        total_LE = np.asarray(total, np.int64)
        if self._last is not None and (self._last[1] > total_LE).any():
            self._kept.clear()
            self._last = None
        self._before, self._last = self._last, (now_s, total_LE)
        if not self._kept or now_s - self._kept[-1][0] >= _EVERY_S:
            self._kept.append(self._last)
        while now_s - self._kept[0][0] > KEEP_S:
            self._kept.popleft()

    def over(self, window_s: float) -> dict[str, Any]:
        """{"seconds", "tokens": [layer][expert]} of the last `window_s`; of the shortest time known for 0."""
        if self._last is None:
            return {"seconds": 0.0, "tokens": []}
        now_s, total_LE = self._last
        then_s, before_LE = self._start(now_s - window_s) if window_s > 0 else self._before or self._last
        return {"seconds": now_s - then_s, "tokens": (total_LE - before_LE).tolist()}

    def _start(self, from_s: float) -> tuple[float, np.ndarray]:
        """The newest that is not younger, else the oldest."""
        older = [each for each in self._kept if each[0] <= from_s]
        return older[-1] if older else self._kept[0]

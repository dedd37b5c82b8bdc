"""What happened to a cluster, for people."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

MAX_EVENTS = 1000


@dataclass(frozen=True)
class Event:
    """Something that people may want to know; `time_s` is Unix time."""

    time_s: float
    kind: str
    subject: str
    text: str


class EventLog:
    """The newest MAX_EVENTS, and how many there were of each kind, `counts`. `wall_offset_s`: Unix time minus now_s."""

    def __init__(self, wall_offset_s: float) -> None:
        self._wall_offset_s = wall_offset_s
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, subject: str, text: str, now_s: float) -> None:
        self.counts[kind] += 1
        self._events.append(Event(now_s + self._wall_offset_s, kind, subject, text))

    def to_json(self) -> list[dict[str, Any]]:
        """The oldest first."""
        return [asdict(event) for event in self._events]

"""What failed or was taken out, what became of it, and how long that took: pairs of events that belong together."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]

_SHARD_IN_TEXT = re.compile(r"\bshard (\d+)")
_SHARD_IN_NAME = re.compile(r"^(?:experts|shadow)-(\d+)-")


@dataclass(frozen=True)
class _Kind:
    """An incident from an event of kind `begin` to the next one of kind `end` about the same thing (`about`)."""

    begin: str
    end: str
    title: str
    severity: str
    about: str  # "subject", "shard", or "any"
    outcome: str  # what the subject of the last event has done


_KINDS = (
    _Kind("worker_lost", "worker_online", "Worker lost", "bad", "shard", "is online"),
    _Kind("shard_missing", "shard_back", "Shard without a worker, its calls waited", "bad", "subject", "has a worker"),
    _Kind("stall_began", "stall_ended", "Engine waited for experts", "warn", "subject", "goes on"),
    _Kind("engine_lost", "engine_ready", "Engine lost", "bad", "any", "is ready"),
    _Kind("worker_draining", "worker_left", "Worker drained", "info", "subject", "has left"),
)
_BEGINS = {kind.begin: kind for kind in _KINDS}


def incidents(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Oldest first: {"title", "severity", "subject", "why", "begin_s", "end_s", "done"}, the last two None if open.

    `why` has the words of the event that began it, `done` those of the one that ended it.
    """
    found: list[dict[str, Any]] = []
    still_open: list[tuple[_Kind, str, dict[str, Any]]] = []
    for event in events:
        # One worker that comes online ends one loss, the oldest.
        ended = next((each for each in still_open if _ends(event, each[0], each[1])), None)
        if ended is not None:
            still_open.remove(ended)
            ended[2].update(end_s=event["time_s"], done=f"{event['subject']} {ended[0].outcome} ({event['text']})")
        kind = _BEGINS.get(event["kind"])
        if kind is not None:
            found.append(_begun(kind, event))
            still_open.append((kind, _about(kind, event), found[-1]))
    return found


def _begun(kind: _Kind, event: Event) -> dict[str, Any]:
    return {
        "title": kind.title,
        "severity": kind.severity,
        "subject": event["subject"],
        "why": event["text"],
        "begin_s": event["time_s"],
        "end_s": None,
        "done": None,
    }


def _ends(event: Event, kind: _Kind, about: str) -> bool:
    return bool(event["kind"] == kind.end and _about(kind, event) == about)


def _about(kind: _Kind, event: Event) -> str:
    if kind.about == "any":
        return ""
    if kind.about == "subject":
        return str(event["subject"])
    match = _SHARD_IN_NAME.match(event["subject"]) or _SHARD_IN_TEXT.search(event["text"])
    return match[1] if match else str(event["subject"])

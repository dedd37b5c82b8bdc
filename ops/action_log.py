"""Actions one at a time, with what is said about them, whoever looks; each is written to the audit log."""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, SwitchyardError

_KEPT = 50

Say = Callable[[str], None]


class Busy(Exception):
    """Another action is under way."""


@dataclass
class Record:
    """One action. Times are Unix times; `end_s` is None while it goes on, `error` empty unless it failed."""

    number: int
    name: str
    body: Mapping[str, Any]
    asked_by: str
    begin_s: float
    words: list[str] = field(default_factory=list)
    end_s: float | None = None
    error: str = ""


class ActionLog:
    """`changed` is called whenever there is something new to see."""

    def __init__(self, audit_log: Path, changed: Callable[[], None]) -> None:
        self._one = threading.Lock()
        self._changed = changed
        self._records: deque[Record] = deque(maxlen=_KEPT)
        self._audit = _audit_logger(audit_log)
        self._number = 0

    def perform(
        self, name: str, body: Mapping[str, Any], asked_by: str, action: Callable[[Say], None], say: Say
    ) -> dict[str, Any]:
        """Do it; returns {"done": true}, or {"error": text, "status": 400 or 500}. Raises Busy.

        It goes on to its end when whoever asked has left and `say` raises ConnectionError.
        """
        if not self._one.acquire(blocking=False):
            raise Busy("another action is under way; try again when it is done")
        try:
            self._number += 1
            record = Record(self._number, name, dict(body), asked_by, time.time())
            self._records.append(record)
            self._changed()
            outcome = self._outcome(record, action, say)
            record.end_s, record.error = time.time(), outcome.get("error", "")
            self._audit.info("%s: %s %s: %s", asked_by, name, json.dumps(body), record.error or "done")
            self._changed()
            return outcome
        finally:
            self._one.release()

    def recent(self) -> list[dict[str, Any]]:
        """The last ones, oldest first, as in Record."""
        return [dataclasses.asdict(record) for record in list(self._records)]

    def close(self) -> None:
        for handler in self._audit.handlers[:]:
            self._audit.removeHandler(handler)
            handler.close()

    def _outcome(self, record: Record, action: Callable[[Say], None], say: Say) -> dict[str, Any]:
        def speak(text: str) -> None:
            record.words.append(text)
            self._changed()
            with contextlib.suppress(ConnectionError):
                say(text)

        try:
            action(speak)
        except ConfigError as error:
            return {"error": str(error), "status": HTTPStatus.BAD_REQUEST}
        # The top of an action: whatever went wrong is told to whoever asked for it.
        except Exception as error:
            return {"error": in_words(error), "status": HTTPStatus.INTERNAL_SERVER_ERROR}
        return {"done": True}


def in_words(error: Exception) -> str:
    """What people are told."""
    return str(error) if isinstance(error, SwitchyardError) else f"{type(error).__name__}: {error}"


def _audit_logger(path: Path) -> logging.Logger:
    logger = logging.Logger("switchyard.audit")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return logger

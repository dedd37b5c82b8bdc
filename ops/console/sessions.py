"""Signing in from a browser: a link with a code that works once, for a cookie that works for some hours.

The code stands in the link's fragment, which browsers send to nobody. Only hashes are kept.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable

CODE_LIVES_S = 600.0
SESSION_LIVES_S = 12 * 3600.0
_MAX_SESSIONS = 64


class Sessions:
    """Codes and sessions of one server. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._codes: dict[bytes, float] = {}  # hash -> when it ends
        self._sessions: dict[bytes, float] = {}

    def new_code(self) -> str:
        """A code for sign_in(), once, within ten minutes."""
        return self._draw(self._codes, CODE_LIVES_S)

    def sign_in(self, code: str) -> str | None:
        """A session for a code; None when the code is not one, was used, or is too old."""
        with self._lock:
            end_s = self._codes.pop(_hash(code), 0.0)
        return self._draw(self._sessions, SESSION_LIVES_S) if end_s > self._clock() else None

    def is_valid(self, session: str) -> bool:
        return self._sessions.get(_hash(session), 0.0) > self._clock()

    def sign_out(self, session: str) -> None:
        with self._lock:
            self._sessions.pop(_hash(session), None)

    def _draw(self, kept: dict[bytes, float], lives_s: float) -> str:
        drawn = secrets.token_urlsafe(32)
        with self._lock:
            now_s = self._clock()
            for key in [key for key, end_s in kept.items() if end_s <= now_s]:
                del kept[key]
            while len(kept) >= _MAX_SESSIONS:  # the oldest has to go
                del kept[next(iter(kept))]
            kept[_hash(drawn)] = now_s + lives_s
        return drawn


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()

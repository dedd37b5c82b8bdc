"""Changing the data plane's secret while everything runs: what each member accepts and proves, step by step.

    step            workers accept    engines prove    goes on once
    settled         A                 A
    spreading       A, B              A                every worker holds it
    switching       A, B              B                every engine holds it
    settled again   B                 B

A member holds a step once it has asked for the one after it. Whatever is delayed, what an engine proves is accepted by
every worker, for a step is never more than one away from what any member holds. Open connections stay: they were proven
when they were made. Decisions only; deployments/expert_router.py keeps the state and asks who lives.
"""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass

from cluster.auth import check_secret
from cluster.errors import ConfigError

SECRET_BYTES = 32


@dataclass(frozen=True)
class Secrets:
    """One step. A larger `serial` is newer."""

    serial: int
    accepted: tuple[bytes, ...]
    proven: bytes

    @property
    def stage(self) -> str:
        """settled, spreading or switching."""
        if len(self.accepted) == 1:
            return "settled"
        return "spreading" if self.proven == self.accepted[0] else "switching"

    def to_json(self) -> str:
        accepted = [secret.hex() for secret in self.accepted]
        return json.dumps({"serial": self.serial, "accepted": accepted, "proven": self.proven.hex()})

    @classmethod
    def from_json(cls, text: str) -> "Secrets":
        """The inverse of to_json, for what the cluster itself has stored."""
        fields = json.loads(text)
        accepted = tuple(check_secret(bytes.fromhex(each)) for each in fields["accepted"])
        return cls(fields["serial"], accepted, bytes.fromhex(fields["proven"]))

    @classmethod
    def drawn(cls) -> "Secrets":
        """The first step of a new cluster."""
        secret = os.urandom(SECRET_BYTES)
        return cls(1, (secret,), secret)


class Rotation:
    """Where the change is, and who has come along."""

    def __init__(self, now: Secrets) -> None:
        self.now = now
        self._held: dict[str, int] = {}  # member id -> serial

    def begin(self, fresh: bytes) -> None:
        """Start the change to another secret. Raises ConfigError while one is under way."""
        if self.now.stage != "settled":
            raise ConfigError("the secret is being changed already; `switchyard events` shows how far that is.")
        self.now = Secrets(self.now.serial + 1, (self.now.proven, check_secret(fresh)), self.now.proven)

    def holds(self, member_id: str, serial: int) -> None:
        """A worker or an engine has that step."""
        self._held[member_id] = serial

    def advance(self, workers: Collection[str], engines: Collection[str]) -> bool:
        """Go one step on if all who live are ready for it; whether that happened."""
        members = {*workers, *engines}
        self._held = {member: serial for member, serial in self._held.items() if member in members}
        now = self.now
        if now.stage == "spreading" and self._all_hold(workers):
            self.now = Secrets(now.serial + 1, now.accepted, now.accepted[1])
        elif now.stage == "switching" and self._all_hold(engines):
            self.now = Secrets(now.serial + 1, (now.proven,), now.proven)
        return self.now is not now

    def is_everywhere(self, workers: Collection[str], engines: Collection[str]) -> bool:
        """Whether everybody who lives holds the newest step."""
        return self._all_hold({*workers, *engines})

    def _all_hold(self, members: Collection[str]) -> bool:
        return all(self._held.get(member) == self.now.serial for member in members)

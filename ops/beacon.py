"""What a head tells machines that want to join, through Ray's key-value store: its versions and its clock."""

import dataclasses
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass

from cluster.errors import ConfigError

KEY = b"switchyard:head"
EVERY_S = 1.0
_CLOCK_LIMIT_S = 10.0  # it is told every second, and a busy head may be late


@dataclass(frozen=True)
class Beacon:
    """Versions of what has to be equal on every machine, and the wall clock in seconds since 1970."""

    switchyard: str
    ray: str
    python: str
    time_s: float

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes | None) -> "Beacon":
        """Raises ConfigError when there is none: the cluster was not started by `switchyard up`."""
        try:
            return cls(**json.loads(data or b""))
        except (ValueError, TypeError):
            raise ConfigError("that is a Ray cluster, but not one of `switchyard up` of this version.") from None


def own_beacon() -> Beacon:
    """Of this process, now."""
    version = importlib.metadata.version
    return Beacon(version("switchyard"), version("ray"), platform.python_version(), time.time())


def check_fit(head: Beacon, own: Beacon) -> None:
    """Raises ConfigError that says what differs and what to do, when this machine cannot be part of the cluster."""
    for name, value in dataclasses.asdict(own).items():
        other = getattr(head, name)
        if name != "time_s" and value != other:
            raise ConfigError(f"{name} is {value} here and {other} on the head. {_ADVICE[name]}")
    ahead_s = own.time_s - head.time_s
    if abs(ahead_s) > _CLOCK_LIMIT_S:
        kind = "ahead of" if ahead_s > 0 else "behind"
        raise ConfigError(f"this machine's clock is {abs(ahead_s):.0f} s {kind} the head's. Set both with NTP.")


_ADVICE = {
    "switchyard": "Install the same release on every machine.",
    "ray": "Run `make install` of the same release on every machine.",
    "python": "Ray moves Python objects between machines: install the same Python, and `make install` with it.",
}

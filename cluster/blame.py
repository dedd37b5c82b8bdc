"""Who is to blame when a layer call goes wrong, and who is asked meanwhile: pure decisions; the clock is an argument.

A replica that is accused is suspected for a while: others are asked first. Nothing here changes the routing table; that
is the expert router's, which hears of every accusation and knows more (cluster/membership.py).
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_SUSPECTED_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # by the number of accusations since the last timely answer
NEVER_NS = 1 << 62


class Cause(enum.Enum):
    """What a replica is accused of."""

    SILENT = "silent"
    """No answer within a multiple of what its shard takes: hung, frozen, slow or cut off."""
    MALFORMED = "malformed"
    """Bytes that break the wire format."""
    NOT_FINITE = "not_finite"
    """NaN or infinity where another try gave numbers."""
    FAILED = "failed"
    """Its kernel raised where another replica's did not."""
    REFUSED = "refused"
    """It knows the secret and will not serve us: it holds another model, for example."""
    WRONG_SECRET = "wrong_secret"
    """It does not know the cluster's secret."""
    UNREACHABLE = "unreachable"
    """It is in the table and will not be connected to. So ends, too, who takes our proof for a stranger's."""


# It was busy with others' calls: a matter of load, not of health.
OVERLOADED = "overloaded"

OnAccused = Callable[[str, Cause], None]  # replica_id, cause


@dataclass
class Record:
    strikes: int = 0
    until_ns: int = 0


@dataclass
class Suspicions:
    """Which replicas are under suspicion. `on_accused` is told when a suspicion begins, not while it lasts."""

    on_accused: OnAccused = lambda _replica_id, _cause: None
    counts: Counter[str] = field(default_factory=Counter)
    review_ns: int = NEVER_NS
    """When is_suspected() may answer otherwise than at the last reviewed()."""
    _records: dict[str, Record] = field(default_factory=dict)

    def accuse(self, replica_id: str, cause: Cause, now_ns: int) -> None:
        """Suspect a replica, the longer the more often it was accused in a row."""
        self.counts[cause.value] += 1
        record = self._records.setdefault(replica_id, Record())
        is_new = now_ns >= record.until_ns
        if is_new:
            record.until_ns = now_ns + int(_SUSPECTED_S[min(record.strikes, len(_SUSPECTED_S) - 1)] * 1e9)
            record.strikes += 1
            self.review_ns = 0
            self.on_accused(replica_id, cause)

    def explain(self, replica_id: str, compute_ns: int, queue_ns: int) -> None:
        """An answer came too late to be used, and says where its time went."""
        if queue_ns > compute_ns:
            self.counts[OVERLOADED] += 1
            self.acquit(replica_id)

    def acquit(self, replica_id: str) -> None:
        """It answered in time, or is gone."""
        if self._records and self._records.pop(replica_id, None) is not None:
            self.review_ns = 0

    def is_suspected(self, replica_id: str, now_ns: int) -> bool:
        record = self._records.get(replica_id)
        return record is not None and now_ns < record.until_ns

    def suspected(self, now_ns: int) -> list[str]:
        """Ids of all replicas under suspicion."""
        return sorted(name for name, record in self._records.items() if now_ns < record.until_ns)

    def reviewed(self, now_ns: int) -> None:
        """Whoever acts on suspicions has asked about every replica now."""
        self.review_ns = min((r.until_ns for r in self._records.values() if now_ns < r.until_ns), default=NEVER_NS)


class Latency:
    """Recent times from sending to answer of one shard's calls, by size of the call: nanoseconds."""

    __slots__ = ("_mean_ns",)

    def __init__(self) -> None:
        self._mean_ns = [0] * 32  # by bit length of the number of tokens; 0: not seen yet

    def note(self, num_tokens: int, ns: int) -> None:
        """A call of so many tokens was answered after `ns`."""
        size = num_tokens.bit_length()
        mean_ns = self._mean_ns[size]
        self._mean_ns[size] = mean_ns + ((ns - mean_ns) >> 3) if mean_ns else ns

    def expected_ns(self, num_tokens: int) -> int:
        """The mean for such calls; else that of the next smaller ones, scaled up by tokens; else of larger ones.

        0 if no call was answered yet.
        """
        size = num_tokens.bit_length()
        for smaller in range(size, -1, -1):
            if self._mean_ns[smaller]:
                return self._mean_ns[smaller] << (size - smaller)
        return next(filter(None, self._mean_ns[size:]), 0)

"""What a fault has cost the people who were asking: pure functions of the answers and of the cluster's status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.sabotage import Fault
from ops.bench.fault_load import Answer

# After these the worker does not come back: another one has to.
REPLACED = frozenset(
    {
        Fault.SIGKILL,
        Fault.SIGSTOP,
        Fault.WRONG_SHAPE,
        Fault.NOT_FINITE,
        Fault.WRONG_SECRET,
        Fault.WRONG_MODEL,
    }
)

FAILOVER_S = 1.0

Status = Mapping[str, Any]  # Control.status()


@dataclass(frozen=True)
class Row:
    """One fault under one load. Gaps are the longest times in which a stream got no token, seconds."""

    fault: str
    streams: int
    strikes: int
    requests: int
    failed: int
    unclean: int
    """Failed without an error in OpenAI's shape."""
    changed: int
    """Answered with other tokens than without the fault."""
    calm_gap_s: float
    """Before the first fault."""
    fault_gap_s: float
    """That was open when a fault struck, or began within FAILOVER_S after it: what failing over costs."""
    gap_s: float
    """Of the whole time; on few cores the start of a successor shows in it."""
    recovered_s: float
    """From the fault until every shard has all its replicas, each has served since, and every engine is ready."""
    throughput: float
    """Tokens per second from the first fault to the last recovery, divided by the same before it."""
    problems: tuple[str, ...] = ()
    """What check_integrity() found afterwards, and an epoch that went back."""
    errors: tuple[str, ...] = ()

    @property
    def extra_gap_s(self) -> float:
        """What failing over costs beyond what streams wait anyway, seconds."""
        return max(0.0, self.fault_gap_s - self.calm_gap_s)

    @property
    def is_as_promised(self) -> bool:
        """No request failed, but those of an engine that died, which end with a clean error; no token changed."""
        allowed = self.fault == Fault.ENGINE_LOSS.value
        return not self.changed and not self.problems and not self.unclean and (allowed or not self.failed)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "extra_gap_s": self.extra_gap_s, "is_as_promised": self.is_as_promised}


@dataclass(frozen=True)
class Window:
    """Times of one row: the load was calm from calm_s to the first of strikes_s, and whole again at whole_s."""

    calm_s: float
    strikes_s: tuple[float, ...]
    whole_s: float
    recovered_s: float

    @property
    def struck_s(self) -> float:
        return self.strikes_s[0]


def make_row(
    fault: Fault,
    streams: int,
    window: Window,
    answers: Sequence[Answer],
    expected: Sequence[tuple[int, ...]],
    problems: Iterable[str],
) -> Row:
    """Count and measure. Answers that ended before the fault are the yardstick of what came after it."""
    met = [answer for answer in answers if answer.ended_s > window.struck_s]
    failed = [answer for answer in met if answer.error]
    calm_rate = _rate(answers, window.calm_s, window.struck_s)
    return Row(
        fault=fault.value,
        streams=streams,
        strikes=len(window.strikes_s),
        requests=len(met),
        failed=len(failed),
        unclean=sum(not answer.is_clean for answer in failed),
        changed=sum(not answer.error and answer.tokens != expected[answer.prompt] for answer in answers),
        calm_gap_s=_longest_gap(answers, window.calm_s, window.struck_s),
        fault_gap_s=_gap_at(answers, window.strikes_s),
        gap_s=_longest_gap(answers, window.struck_s, float("inf")),
        recovered_s=window.recovered_s,
        throughput=_rate(answers, window.struck_s, window.whole_s) / calm_rate if calm_rate else 0.0,
        problems=tuple(problems),
        errors=tuple(sorted({answer.error for answer in failed})),
    )


def _longest_gap(answers: Iterable[Answer], after_s: float, until_s: float) -> float:
    """Of the gaps that ended in that time."""
    return max((gap for answer in answers for end, gap in answer.gaps_s() if after_s < end <= until_s), default=0.0)


def _gap_at(answers: Iterable[Answer], strikes_s: Sequence[float]) -> float:
    gaps = [gap for answer in answers for gap in answer.gaps_s()]
    return max(
        (length for end, length in gaps for at in strikes_s if end > at and end - length < at + FAILOVER_S), default=0.0
    )


def _rate(answers: Iterable[Answer], after_s: float, until_s: float) -> float:
    """Events with tokens per second."""
    count = sum(after_s < event_s <= until_s for answer in answers for event_s in answer.event_s)
    return count / (until_s - after_s) if until_s > after_s else 0.0


def online(shard: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A shard's replicas that are asked, without shadows and spares."""
    return [r for r in shard["replicas"] if r["state"] == "online" and r["role"] == "primary"]


def served_by(status: Status) -> set[str]:
    """The ids of all replicas that are asked."""
    return {replica["id"] for shard in status["shards"] for replica in online(shard)}


def messages_served(status: Status) -> dict[str, int]:
    """By replica id."""
    return {r["id"]: int(r["load"].get("messages", 0)) for shard in status["shards"] for r in shard["replicas"]}


def is_whole(status: Status, fault: Fault, victim: str, served_before: Mapping[str, int], num_engines: int) -> bool:
    """Whether all is as it was before the fault befell `victim`, a replica's or an engine's id."""
    for shard in status["shards"]:
        replicas = online(shard)
        if len(replicas) != shard["wanted"] or len(replicas) != len(shard["replicas"]):
            return False
        if any(int(r["load"].get("messages", 0)) <= served_before.get(r["id"], 0) for r in replicas):
            return False
    ids = {replica["id"] for shard in status["shards"] for replica in shard["replicas"]}
    if fault in REPLACED and victim in ids:
        return False
    engines = status["engines"]
    if len(engines) != num_engines or any(engine["state"] != "ready" for engine in engines):
        return False
    return fault is not Fault.ENGINE_LOSS or victim not in {engine["id"] for engine in engines}


_COLUMNS = (
    "fault | streams | requests | failed | tokens changed | longest gap before, s | at the fault, s | in all, s"
    " | whole again after, s | throughput"
)


def table(rows: Iterable[Row]) -> str:
    """As Markdown; what went wrong stands below."""
    lines = [f"| {_COLUMNS} |", "|---|" + "---:|" * (_COLUMNS.count("|"))]
    notes = []
    for row in rows:
        lines.append(
            f"| {row.fault} | {row.streams} | {row.requests} | {row.failed} | {row.changed} | {row.calm_gap_s:.2f} | "
            f"{row.fault_gap_s:.2f} | {row.gap_s:.2f} | {row.recovered_s:.1f} | {row.throughput:.2f} |"
        )
        notes += [f"{row.fault}, {row.streams} streams: {text}" for text in (*row.problems, *row.errors)]
    return "\n".join([*lines, *([""] if notes else []), *notes])

"""A layer call in flight: its parts, one per worker (and chunk), and where each of them stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cluster import wire
from cluster.histogram import Histogram
from cluster.plan import Plan, Route
from cluster.transport import Link, Slot

PENDING, SENT, DONE, COMBINED = range(4)

# A try is silent when it takes so many times what such calls took lately, and at least so long: below that a busy
# host's scheduling looks like a fault. On hedged requests and their budget: "The Tail at Scale", Dean and Barroso 2013.
_PATIENCE = 8
_LEAST_PATIENCE_NS = 100_000_000
# A system that is slow as a whole must not be asked twice for everything: 5% of messages, after a reserve.
_HEDGES_PER_MESSAGE = 0.05
_MAX_HEDGES = 16.0


class Part:
    """The tokens of one call that go to one shard in one message."""

    __slots__ = (
        "avoid", "call", "failures", "link", "not_finite", "num_tokens", "overdue_ns", "plan", "result", "rivals",
        "route", "rows", "slot", "source", "state",
    )  # fmt: skip

    def __init__(self, call: Call, plan: Plan, route: Route, rows: slice | np.ndarray, num_tokens: int) -> None:
        self.call = call
        self.plan = plan
        self.route = route
        self.rows = rows  # of the call's output
        self.num_tokens = num_tokens
        self.state = PENDING
        self.link: Link | None = None
        self.slot: Slot | None = None  # held until the answer was used or the part moved elsewhere
        self.source: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # x, weights, local ids when in no slot
        self.result: torch.Tensor | None = None  # the answer, when it had to leave its slot
        self.rivals: list[tuple[Link, Slot]] = []  # earlier tries whose answer would still do
        self.overdue_ns = 0
        self.avoid: set[Link] = set()
        self.failures: list[str] = []
        self.not_finite: list[str] = []  # replicas that answered with NaN or infinity

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x_tD, weights_tK and local ids_tK of this part, wherever they are now."""
        if self.source is not None:
            return self.source
        assert self.slot is not None
        return self.slot.arrays(self.num_tokens)[:3]

    def partial(self) -> torch.Tensor:
        """The worker's answer, [t, D]."""
        if self.result is not None:
            return self.result
        assert self.slot is not None
        return self.slot.tensors(self.num_tokens)[2]

    def let_go(self) -> None:
        """Give the slots back, or leave them behind as zombies if their answers are still to come."""
        slot, link = self.slot, self.link
        self.slot = None
        if slot is not None and link is not None and link.alive and slot.owner is self:
            link.abandon(slot)
        self.drop_rivals()

    def drop_rivals(self) -> None:
        """Nobody waits for the earlier tries any more."""
        for link, slot in self.rivals:
            if link.alive:
                link.abandon(slot)
        self.rivals.clear()

    def promote_rival(self) -> None:
        """The current try is lost: the newest of the earlier ones takes its place."""
        rivals, self.rivals = self.rivals, []
        self.let_go()
        self.link, self.slot = rivals.pop()
        self.rivals = rivals
        self.source = None
        self.state = SENT

    @property
    def asked(self) -> set[Link]:
        """Who has this part now, or failed it: whom not to ask next."""
        return {*self.avoid, *(link for link, _ in self.rivals), *([self.link] if self.link else [])}

    def leave_slot(self) -> None:
        """Copy what is still needed out of the slot, so that another part may have it."""
        if self.state == DONE:
            self.result = self.partial().clone()
        else:
            x, weights, ids = self.inputs()
            self.source = (x.copy(), weights.copy(), ids.copy())
        self.let_go()


class Call:
    """One start() that was not finished yet."""

    __slots__ = (
        "bells",
        "check_ns",
        "deadline_ns",
        "disjoint",
        "layer",
        "next_part",
        "num_open",
        "num_tokens",
        "on_host",
        "parts",
        "trouble",
        "trouble_ns",
    )

    def __init__(self, layer: int, num_tokens: int, on_host: bool, check_ns: int, deadline_ns: int) -> None:
        self.layer = layer
        self.num_tokens = num_tokens
        self.on_host = on_host  # x came in host memory, and so must out
        self.check_ns = check_ns  # when some part may be overdue, or the call's time is up
        self.deadline_ns = deadline_ns
        self.parts: list[Part] = []
        self.bells: list[int] = []  # doorbells that finish() rings when it waits
        self.num_open = 0  # parts without an answer
        self.next_part = 0  # the first that is not combined yet: the order of combining is that of `parts`
        self.disjoint = False  # no two parts share a row and each covers all its rows' choices: copy instead of add
        self.trouble = False  # some part is PENDING, or overdue
        self.trouble_ns = 0  # when a part first had to go elsewhere; 0 for the calls in which none had to


@dataclass(slots=True)
class Counters:
    """Plain integers, incremented by the engine's thread. rows_: rows of x, once for each message they are part of."""

    calls: int = 0
    tokens: int = 0
    messages: int = 0
    posted_rows: int = 0  # in messages, with those sent again
    answered: int = 0  # messages, with numbers that were used; their rows
    answered_rows: int = 0
    whole_calls: int = 0  # taken by the fast path: one worker holds the layer
    rows_dispatched: int = 0
    rows_combined: int = 0
    rows_failed: int = 0
    resent: int = 0
    hedged: int = 0  # sent to a second replica because the first was silent; hedge_wins: the second was faster
    hedge_wins: int = 0
    not_finite: int = 0  # answers with NaN or infinity that were asked for once more
    not_finite_kept: int = 0  # ... and came again, so the input is to blame
    resplit: int = 0
    lost: int = 0  # messages whose connection broke before the answer came
    expired: int = 0
    errors: int = 0
    refused_draining: int = 0
    timeouts: int = 0
    gather_ns: int = 0
    send_ns: int = 0
    wait_ns: int = 0
    compute_ns: int = 0  # as the workers report it, summed over messages; so is queue_ns
    queue_ns: int = 0
    combine_ns: int = 0


class Timings:
    """Where layer calls' time goes, by the engine's clock. dispatch, wait, combine: per call; wire: per message.

    wire is what is left of a message's round trip beside the worker's queue and kernel; stall is the time from the
    moment in which a part of a call had to go to another replica, or wait for one, to the end of the call.
    """

    __slots__ = ("combine", "dispatch", "stall", "wait", "wire")

    def __init__(self) -> None:
        self.dispatch = Histogram()
        self.wait = Histogram()
        self.combine = Histogram()
        self.wire = Histogram()
        self.stall = Histogram()

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_json() for name in self.__slots__}


class Outbox:
    """Numbers calls, posts parts to links, and decides how long each is waited for before somebody else is asked."""

    def __init__(self, attempt_ns: int) -> None:
        self.counters = Counters()
        self.timings = Timings()
        self.attempt_ns = attempt_ns
        self.least_patience_ns = min(_LEAST_PATIENCE_NS, attempt_ns)
        self.budget_us = min(attempt_ns // 1000, wire.MAX_BUDGET_US)
        self._hedges = _MAX_HEDGES
        self._last_call_id = 0

    def post(self, part: Part, link: Link, slot: Slot, now_ns: int, budget_us: int) -> None:
        """Publish a slot that the part's inputs were written to. The link still has to be rung."""
        part.link, part.slot, part.source = link, slot, None
        part.state = SENT
        part.overdue_ns = overdue_ns = now_ns + self._patience_ns(part)
        if overdue_ns < part.call.check_ns:
            part.call.check_ns = overdue_ns
        self._last_call_id = call_id = self._last_call_id + 1
        link.write_header(slot, call_id, part.call.layer, budget_us, now_ns)
        link.post(slot)
        self.counters.messages += 1
        self.counters.posted_rows += part.num_tokens
        if self._hedges < _MAX_HEDGES:
            self._hedges += _HEDGES_PER_MESSAGE

    def _patience_ns(self, part: Part) -> int:
        expected_ns = part.route.latency.expected_ns(part.num_tokens)
        if not expected_ns or self._hedges < 1:
            return self.attempt_ns
        return min(max(_PATIENCE * expected_ns, self.least_patience_ns), self.attempt_ns)

    def count_sent(self, begin_ns: int, filled_ns: int, now_ns: int) -> None:
        """A call that began at `begin_ns` has all its parts in slots since `filled_ns`, and all workers rung now."""
        self.counters.gather_ns += filled_ns - begin_ns
        self.counters.send_ns += now_ns - filled_ns
        self.timings.dispatch.note(now_ns - begin_ns)

    def count_finished(self, call: Call, begin_ns: int, waited_ns: int, now_ns: int) -> None:
        """A call that was waited for from `begin_ns` to `waited_ns` is combined now."""
        self.counters.wait_ns += waited_ns - begin_ns
        self.counters.combine_ns += now_ns - waited_ns
        self.timings.wait.note(waited_ns - begin_ns)
        self.timings.combine.note(now_ns - waited_ns)
        if call.trouble_ns:
            self.timings.stall.note(now_ns - call.trouble_ns)

    def metrics(self, shape: wire.Agreement) -> dict[str, Any]:
        """Counters, {"seconds": timings}, and bytes on the wire without padding, as plain JSON types."""
        c = self.counters
        row_bytes = shape.row_bytes
        sent_row_bytes = row_bytes + 8 * shape.top_k  # a float32 weight and an int32 id for each choice
        return {
            "counters": asdict(c),
            "bytes_sent": c.messages * wire.HEADER_BYTES + c.posted_rows * sent_row_bytes,
            "bytes_received": c.answered * wire.HEADER_BYTES + c.answered_rows * row_bytes,
            "seconds": self.timings.to_json(),
        }

    def hedge(self) -> None:
        """A part is about to be sent a second time because the first try is silent."""
        self._hedges -= 1
        self.counters.hedged += 1

"""What a call does when a worker does not answer: ask another replica, wait for one, or give up in time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cluster.blame import Cause
from cluster.calls import COMBINED, DONE, PENDING, SENT, Call, Outbox, Part
from cluster.combine import Accumulator
from cluster.errors import ExpertsFailed, ExpertsUnavailable
from cluster.links import Links
from cluster.plan import Plan
from cluster.transport import Link


class Recovery:
    """The slow path of a Dispatcher, in its thread, on its parts."""

    def __init__(
        self,
        links: Links,
        outbox: Outbox,
        total: Accumulator,
        timeout_ns: int,
        on_timeout: Callable[[str], None] | None,
    ) -> None:
        self._links = links
        self._timeout_ns = timeout_ns
        self._on_timeout = on_timeout
        self._outbox = outbox
        self._counters = outbox.counters
        self._sum = total

    def mend(self, call: Call, now_ns: int, out_TD: torch.Tensor) -> None:
        """Absorb news, take overdue parts back if somebody else can serve them, send what is pending.

        When the call's deadline has passed, tells on_timeout and waits on, or raises ExpertsUnavailable where there is
        none. Raises ExpertsFailed when every replica's kernel raised.
        """
        if self._links.has_news:
            self._links.absorb()
        if now_ns >= call.deadline_ns:
            self._counters.timeouts += 1
            if self._on_timeout is None:
                raise ExpertsUnavailable(self._why(call))
            self._on_timeout(self._why(call))
            call.deadline_ns = now_ns + self._timeout_ns
        call.trouble = False
        plan = self._links.plan
        assert plan is not None
        for part in call.parts[:]:
            if part.state == SENT and now_ns >= part.overdue_ns:
                self._hedge(part, plan, now_ns)
            if part.state == PENDING:
                call.trouble_ns = call.trouble_ns or now_ns
                self._send_again(part, plan, now_ns, out_TD)
        call.check_ns = min([call.deadline_ns, *(p.overdue_ns for p in call.parts if p.state == SENT)])

    def _hedge(self, part: Part, plan: Plan, now_ns: int) -> None:
        """A silent part is sent to another replica too, if there is one: the first answer counts."""
        route = plan.find(part.call.layer, part.route.shard.experts)
        if route is None:  # to be split anew
            part.leave_slot()
            part.state = PENDING
            return
        part.route, part.plan = route, plan
        link = route.choose(part.asked)
        if link is None:
            part.overdue_ns = now_ns + self._outbox.least_patience_ns
            return
        assert part.link is not None and part.slot is not None
        self._links.suspicions.accuse(part.link.replica.replica_id, Cause.SILENT, now_ns)
        self._links.refill_routes()
        part.call.trouble_ns = part.call.trouble_ns or now_ns
        inputs = part.inputs()
        part.drop_rivals()
        part.rivals.append((part.link, part.slot))
        self._outbox.hedge()
        self._post(part, link, inputs, now_ns)

    def _send_again(self, part: Part, plan: Plan, now_ns: int, out_TD: torch.Tensor) -> None:
        if part.plan is not plan:
            route = plan.find(part.call.layer, part.route.shard.experts)
            if route is None:
                self._resplit(part, plan, now_ns, out_TD)
                return
            part.route, part.plan = route, plan
        if part.rivals and part.route.choose(part.asked) is None:
            part.promote_rival()
            part.overdue_ns = now_ns + self._outbox.least_patience_ns
            return
        link = self._choose(part)
        if link is not None:
            self._move(part, link, now_ns)
            return
        part.call.trouble = True
        if part.slot is not None or part.source is not None:
            part.leave_slot()
        if part.failures and all(other in part.avoid for other in part.route.all()):
            raise ExpertsFailed(f"layer {part.call.layer}: " + "; ".join(part.failures))

    def _choose(self, part: Part) -> Link | None:
        """Another replica than the last if possible; if slots are all that is missing, answers leave theirs."""
        link = part.route.choose(part.asked) or part.route.choose(part.avoid)
        if link is not None:
            return link
        for link in part.route.all():
            if link not in part.avoid:
                for slot in link.busy[:]:
                    if slot.answered and slot.owner is not None and slot.owner.state == DONE:
                        slot.owner.leave_slot()
                        return link
        return None

    def _move(self, part: Part, link: Link, now_ns: int) -> None:
        """Copy a part's inputs into a slot of another link and send it."""
        inputs, old_link, old_slot = part.inputs(), part.link, part.slot
        self._post(part, link, inputs, now_ns)
        if old_slot is not None and old_link is not None and old_link.alive:
            old_link.abandon(old_slot)
        self._counters.resent += old_link is not None

    def _post(self, part: Part, link: Link, inputs: tuple[np.ndarray, ...], now_ns: int) -> None:
        slot = link.take(part, part.num_tokens)
        for target, source in zip(slot.arrays(part.num_tokens)[:3], inputs, strict=True):
            target[...] = source
        left_us = (part.call.deadline_ns - now_ns) // 1000
        self._outbox.post(part, link, slot, now_ns, min(left_us, self._outbox.budget_us))
        link.ring()

    def _resplit(self, part: Part, plan: Plan, now_ns: int, out_TD: torch.Tensor) -> None:
        """The part's shard is not in the new table: spread its rows over the shards that are."""
        call, counters = part.call, self._counters
        x, weights, local_ids = (a.copy() for a in part.inputs())
        part.let_go()
        if call.disjoint:
            self._stop_copying(call, out_TD)
        rows = np.arange(call.num_tokens)[part.rows]
        at = call.parts.index(part)
        call.num_open -= 1
        counters.rows_dispatched -= part.num_tokens
        counters.resplit += 1
        new: list[Part] = []
        for route, picked, ids in plan.layers[call.layer].split(part.route.global_ids[local_ids]):
            take = slice(None) if picked is None else picked
            piece = Part(call, plan, route, rows[take], len(ids))
            piece.source = (x[take], weights[take], ids)
            new.append(piece)
            call.num_open += 1
            counters.rows_dispatched += piece.num_tokens
        call.parts[at : at + 1] = new
        for piece in new:
            self._send_again(piece, plan, now_ns, out_TD)

    def _stop_copying(self, call: Call, out_TD: torch.Tensor) -> None:
        """Rows may now get several partial sums: go over to adding, beginning with what was copied already."""
        call.disjoint = False
        self._sum.begin(call.num_tokens)
        for part in call.parts:
            if part.state == COMBINED:
                self._sum.add(out_TD[part.rows], part.rows)

    def _why(self, call: Call) -> str:
        open_parts = [p for p in call.parts if p.state in (PENDING, SENT)]
        shards = sorted({p.route.shard.shard_id for p in open_parts})
        asked = sorted({p.link.replica.replica_id for p in open_parts if p.link is not None})
        whom = f"asked {asked}" if asked else "no replica is there"
        refusals = "".join(f"; {name}: {text}" for name, text in self._links.refusals.items())
        return f"layer {call.layer}: shards {shards} did not answer in time ({whom}){refusals}"

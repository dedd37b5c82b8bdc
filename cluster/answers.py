"""What links report of a call's parts: answers, refusals and losses, and who is to blame for them."""

from __future__ import annotations

import time

from cluster import wire
from cluster.blame import Cause, Suspicions
from cluster.calls import DONE, PENDING, Outbox, Part
from cluster.finite import all_finite_of
from cluster.transport import Link, Slot

_now_ns = time.monotonic_ns


class Answers:
    """The callbacks of a dispatcher's links, in its thread."""

    def __init__(self, outbox: Outbox, suspicions: Suspicions, shape: wire.Agreement) -> None:
        self._counters = outbox.counters
        self._wire = outbox.timings.wire
        self._suspicions = suspicions
        self._hidden = shape.hidden
        self._all_finite = all_finite_of(shape.dtype)

    def on_reply(self, slot: Slot, status: int, compute_ns: int, queue_ns: int, text: str) -> None:
        part: Part = slot.owner
        if slot is not part.slot:
            self._on_rival(part, slot, status)
            if slot is not part.slot:
                return
        link = part.link
        assert link is not None
        if status != wire.OK:
            self._on_no_answer(part, link, status, text)
            return
        count = part.num_tokens * self._hidden
        if not self._all_finite(slot.reply_address + wire.HEADER_BYTES, count) and self._asks_again(part, link):
            return
        part.state = DONE
        part.call.num_open -= 1
        now_ns = _now_ns()
        took_ns = now_ns - slot.sent_ns
        part.route.latency.note(part.num_tokens, took_ns)
        wire_ns = took_ns - compute_ns - queue_ns
        self._wire.note(wire_ns if wire_ns > 0 else 0)  # a worker may say anything
        counters = self._counters
        counters.answered += 1
        counters.answered_rows += part.num_tokens
        counters.compute_ns += compute_ns
        counters.queue_ns += queue_ns
        if part.rivals:
            counters.hedge_wins += 1
            part.drop_rivals()
        elif part.failures or part.not_finite:
            self._blame_the_others(part, link, now_ns)
        else:
            self._suspicions.acquit(link.replica.replica_id)

    def _on_rival(self, part: Part, slot: Slot, status: int) -> None:
        """An earlier try was answered while a later one is under way: if it is of use, it becomes the current one."""
        link = next(link for link, rival in part.rivals if rival is slot)
        part.rivals.remove((link, slot))
        if status != wire.OK:
            link.give_back(slot)
            return
        rivals, part.rivals = part.rivals, []
        part.let_go()
        part.link, part.slot, part.rivals = link, slot, rivals

    def _on_no_answer(self, part: Part, link: Link, status: int, text: str) -> None:
        counters = self._counters
        part.state = PENDING
        part.call.trouble = True
        if status == wire.EXPIRED:
            counters.expired += 1
            return
        part.avoid.add(link)
        if status == wire.ERROR:
            counters.errors += 1
            part.failures.append(f"{link.replica.replica_id}: {text}")
        else:
            counters.refused_draining += 1

    def _asks_again(self, part: Part, link: Link) -> bool:
        """An answer is not finite. Whether that is the worker's fault shows when the same is asked once more."""
        if part.not_finite:
            self._counters.not_finite_kept += 1
            part.not_finite.clear()
            return False
        self._counters.not_finite += 1
        part.not_finite.append(link.replica.replica_id)
        part.state = PENDING
        part.call.trouble = True
        return True

    def _blame_the_others(self, part: Part, link: Link, now_ns: int) -> None:
        """One replica has answered what others could not: it was not the input."""
        for replica_id in part.not_finite:
            self._suspicions.accuse(replica_id, Cause.NOT_FINITE, now_ns)
        for failure in part.failures:
            self._suspicions.accuse(failure.partition(":")[0], Cause.FAILED, now_ns)

    def on_down(self, link: Link, _error: Exception) -> None:
        """A worker is gone: its unanswered parts are pending again, with their inputs still in our memory."""
        for slot in link.busy:
            part: Part | None = slot.owner
            if part is None:
                continue
            if slot is not part.slot:
                part.rivals.remove((link, slot))
                continue
            if part.state == DONE:
                part.result = part.partial()
            else:
                part.source = slot.arrays(part.num_tokens)[:3]
                part.state = PENDING
                part.call.trouble = True
                self._counters.lost += 1
            part.slot = None

"""The router's hand inside an engine: groups a layer's tokens by worker, one message per worker, adds the answers.

T tokens, D hidden size, K top_k. start() copies everything out and rings all workers; finish() waits and combines.
Both, and close() and check_integrity(), belong to the engine's thread; update() may be called from any.

On this path a microsecond counts (a decode step makes a dozen calls or more): no torch operation that enters a thread
pool, no logging, no lock; when one worker holds the whole layer, three memcpys out and one back.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cluster import auth, wire
from cluster.answers import Answers
from cluster.blame import OnAccused, Suspicions
from cluster.calls import COMBINED, DONE, Call, Outbox, Part
from cluster.combine import Accumulator
from cluster.errors import Closed, ConfigError, ExpertsUnavailable, IntegrityError, InvalidCall
from cluster.links import Links
from cluster.plan import LayerPlan, Plan, Route, check_global_ids
from cluster.recovery import Recovery
from cluster.routing import RoutingTable
from cluster.shm import copy
from cluster.staging import Staging, as_array
from cluster.transport import Link, Slot

_now_ns = time.monotonic_ns


class Dispatcher:
    """Sends layer calls of one engine to the expert workers of the current routing table.

    expert_timeout_s bounds every call. A replica that takes much longer than usual (at most attempt_timeout_s, default
    a third of expert_timeout_s) is suspected and another one asked too, if there is one; the first answer counts.
    num_slots calls may be open per worker at once. With `on_timeout`, a call whose time is up is reported to it, in
    words, and waits on instead of failing. `on_accused(replica_id, cause)` hears of every suspicion that begins, from
    the engine's thread or a connecting one.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        secret: auth.Secret,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        max_tokens: int,
        expert_timeout_s: float = 30.0,
        attempt_timeout_s: float | None = None,
        num_slots: int = 2,
        on_timeout: Callable[[str], None] | None = None,
        on_accused: OnAccused = lambda _replica_id, _cause: None,
    ) -> None:
        if expert_timeout_s <= 0:
            raise ConfigError(f"expert_timeout_s must be positive, not {expert_timeout_s}")
        auth.current(secret)
        wire.dtype_code(dtype)
        self._shape = wire.Agreement(hidden_size, top_k, dtype, max_tokens, num_slots)
        self._dtype = dtype
        self._row_bytes = self._shape.row_bytes
        self._timeout_ns = int(expert_timeout_s * 1e9)
        attempt_s = expert_timeout_s / 3 if attempt_timeout_s is None else min(attempt_timeout_s, expert_timeout_s)
        self._outbox = Outbox(int(attempt_s * 1e9))
        self._suspicions = Suspicions(on_accused)
        answers = Answers(self._outbox, self._suspicions, self._shape)
        self._links = Links(
            self._shape,
            engine_id,
            secret,
            self._suspicions,
            answers.on_reply,
            answers.on_down,
            self._outbox.attempt_ns,
        )
        self._sum = Accumulator(hidden_size, max_tokens)
        self._recovery = Recovery(self._links, self._outbox, self._sum, self._timeout_ns, on_timeout)
        self._staging: Staging | None = None  # made when the first tensor on another device comes
        self._calls: dict[int, Call] = {}
        self._last_ticket = 0
        self._closed = False
        self.counters = self._outbox.counters

    # -- the interface --------------------------------------------------------------------------------------------

    def update(self, table: RoutingTable) -> None:
        """Adopt a newer table at the next layer call (or at once, in a call that waits for a replica). Thread-safe.

        Connects to new workers before it returns (up to 2 s); ignores older epochs. Raises InvalidTable.
        """
        self._links.update(table)

    def start(
        self,
        layer: int,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        *,
        ring: bool = True,
    ) -> int:
        """Send a layer's tokens to their workers; returns a ticket for finish(). The inputs may be overwritten then.

        ring=False, for a caller that calls finish() next: workers on this host are told when this thread goes to sleep.
        x_TD has the constructor's dtype, weights are float32, ids (global, -1: none) int32 or int64; on one device.
        Raises InvalidCall, or ExpertsUnavailable if no routing table came within expert_timeout_s.
        """
        begin_ns = _now_ns()
        num_tokens = self._check(x_TD, topk_weights_TK, topk_ids_TK)
        plan = self._current_plan(begin_ns)
        if not 0 <= layer < len(plan.layers):
            raise InvalidCall(f"layer {layer} of {len(plan.layers)}")
        layer_plan = plan.layers[layer]
        on_host: bool = x_TD.is_cpu
        if not on_host:
            self._staging = self._staging or Staging(self._shape, x_TD.device)
            x_TD, topk_weights_TK, topk_ids_TK = self._staging.input(x_TD, topk_weights_TK, topk_ids_TK)
        call = Call(layer, num_tokens, on_host, begin_ns + self._outbox.attempt_ns, begin_ns + self._timeout_ns)
        bells = None if ring else call.bells
        route = layer_plan.whole
        link = route.choose() if route is not None and 0 < num_tokens <= self._shape.max_tokens else None
        if route is not None and link is not None and x_TD.is_contiguous() and topk_weights_TK.is_contiguous():
            self._send_whole(call, plan, route, link, x_TD, topk_weights_TK, topk_ids_TK, begin_ns, bells)
        elif num_tokens:
            self._send_split(call, plan, layer_plan, x_TD, topk_weights_TK, topk_ids_TK, begin_ns, bells)
        self.counters.calls += 1
        self.counters.tokens += num_tokens
        self._last_ticket = ticket = self._last_ticket + 1
        self._calls[ticket] = call
        return ticket

    def finish(self, ticket: int, out_TD: torch.Tensor) -> None:
        """Wait for every worker of a call and write the sum of their answers into `out_TD` (dtype of x).

        Raises ExpertsUnavailable after expert_timeout_s, ExpertsFailed if the kernel raised everywhere, InvalidCall.
        """
        call = self._calls.pop(ticket, None)
        if call is None:
            raise InvalidCall(f"ticket {ticket} is unknown or finished")
        try:
            self._check_out(call, out_TD)
            self._finish(call, out_TD)
        except BaseException:
            self._drop(call)
            raise

    def stats(self) -> dict[str, Any]:
        """Counters since the start (nanoseconds end in _ns) and gauges."""
        links = self._links.all()
        plan = self._links.plan
        return {
            **dataclasses.asdict(self.counters),
            "lost_links": self._links.num_lost,
            "late_replies": self._links.num_late_replies(),
            "epoch": plan.table.epoch if plan else -1,
            "links": {link.replica.replica_id: getattr(link, "kind", "") for link in links},
            "refusals": dict(self._links.refusals),
            "accusations": dict(self._suspicions.counts),
            "suspected": self._suspicions.suspected(_now_ns()),
            "suspicion_ignored": sum(route.num_unsuspecting for route in plan.routes.values()) if plan else 0,
            "open_calls": len(self._calls),
        }

    def metrics(self) -> dict[str, Any]:
        """What is published of this dispatcher (cluster/readings.py), as plain JSON types. From any thread."""
        plan = self._links.plan
        epoch = plan.table.epoch if plan else -1
        return {**self._outbox.metrics(self._shape), "accusations": dict(self._suspicions.counts), "epoch": epoch}

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows dispatched = combined + failed + in flight, and no slot is lost."""
        c = self.counters
        open_parts = [p for call in self._calls.values() for p in call.parts if p.state != COMBINED]
        in_flight = sum(p.num_tokens for p in open_parts)
        if c.rows_dispatched != c.rows_combined + c.rows_failed + in_flight:
            ended = f"{c.rows_combined} combined, {c.rows_failed} failed, {in_flight} in flight"
            raise IntegrityError(f"{c.rows_dispatched} rows dispatched, {ended}")
        for link in self._links.all():
            link.check_integrity(open_parts)

    def close(self) -> None:
        """Close every connection. Open calls are lost; their tickets are forgotten."""
        if self._closed:
            return
        self._closed = True
        for call in self._calls.values():
            self._drop(call)
        self._calls.clear()
        self._links.close()

    # -- start ----------------------------------------------------------------------------------------------------

    def _check(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> int:
        num_tokens, hidden = x_TD.shape
        shape = (num_tokens, self._shape.top_k)
        if x_TD.dtype is not self._dtype or hidden != self._shape.hidden:
            agreed = f"{self._dtype} [T, {self._shape.hidden}]"
            raise InvalidCall(f"x is {x_TD.dtype} [{num_tokens}, {hidden}], agreed {agreed}")
        if weights_TK.dtype is not torch.float32 or weights_TK.shape != shape or ids_TK.shape != shape:
            given = f"weights {weights_TK.dtype} {tuple(weights_TK.shape)}, ids {tuple(ids_TK.shape)}"
            raise InvalidCall(f"{given}; need float32 and {shape}")
        if ids_TK.dtype is not torch.int32 and ids_TK.dtype is not torch.int64:
            raise InvalidCall(f"ids are {ids_TK.dtype}, need int32 or int64")
        if weights_TK.is_cpu is not x_TD.is_cpu or ids_TK.is_cpu is not x_TD.is_cpu:
            raise InvalidCall(f"x is on {x_TD.device}, weights on {weights_TK.device}, ids on {ids_TK.device}")
        return num_tokens

    def _current_plan(self, begin_ns: int) -> Plan:
        links = self._links
        if links.has_news or begin_ns >= self._suspicions.review_ns:
            links.absorb()
        while links.plan is None:
            if self._closed:
                raise Closed("dispatcher")
            left_ns = begin_ns + self._timeout_ns - _now_ns()
            if left_ns <= 0:
                raise ExpertsUnavailable("no routing table came within expert_timeout_s")
            links.poll(left_ns / 1e9)
            if links.has_news:
                links.absorb()
        return links.plan

    def _send_whole(
        self,
        call: Call,
        plan: Plan,
        route: Route,
        link: Link,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        begin_ns: int,
        bells: list[int] | None,
    ) -> None:
        """One worker holds the whole layer: three copies into its slot, local ids are global ids."""
        n = call.num_tokens
        part = Part(call, plan, route, slice(0, n), n)
        slot = link.take(part, n)
        _, weights_address, slot_ids_TK = slot.frame(n)
        copy(slot.request_address + wire.HEADER_BYTES, x_TD.data_ptr(), n * self._row_bytes)
        copy(weights_address, weights_TK.data_ptr(), n * self._shape.top_k * 4)
        slot_ids_TK[...] = ids_TK.numpy()
        try:
            check_global_ids(slot_ids_TK, plan.table.num_experts)
        except InvalidCall:
            link.give_back(slot)
            raise
        call.parts.append(part)
        call.num_open = 1
        call.disjoint = True
        counters = self.counters
        counters.whole_calls += 1
        counters.rows_dispatched += n
        filled_ns = _now_ns()
        self._outbox.post(part, link, slot, filled_ns, self._outbox.budget_us)
        _ring(link, bells)
        self._outbox.count_sent(begin_ns, filled_ns, _now_ns())

    def _send_split(
        self,
        call: Call,
        plan: Plan,
        layer_plan: LayerPlan,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        begin_ns: int,
        bells: list[int] | None,
    ) -> None:
        """Several workers, or several chunks: pick each worker's rows; all are posted before any is rung."""
        x, weights, ids = as_array(x_TD), weights_TK.detach().numpy(), ids_TK.numpy()
        limit = self._shape.max_tokens
        call.disjoint = layer_plan.whole is not None
        pieces = []
        for first in range(0, call.num_tokens, limit):
            end = min(first + limit, call.num_tokens)
            pieces += [(first, end, *piece) for piece in layer_plan.split(ids[first:end])]
        filled: list[tuple[Part, Link, Slot]] = []
        for first, end, route, rows, local_ids in pieces:
            where: slice | np.ndarray = slice(first, end) if rows is None else rows + first
            part = Part(call, plan, route, where, len(local_ids))
            call.parts.append(part)
            call.num_open += 1
            self.counters.rows_dispatched += part.num_tokens
            link = route.choose()
            if link is None:
                part.source = (x[where].copy(), weights[where].copy(), local_ids)
                call.trouble = True
                continue
            slot = link.take(part, part.num_tokens)
            slot_x, slot_weights, slot_ids, _ = slot.arrays(part.num_tokens)
            if isinstance(where, slice):
                slot_x[...] = x[where]
                slot_weights[...] = weights[where]
            else:
                x.take(where, axis=0, out=slot_x, mode="clip")
                weights.take(where, axis=0, out=slot_weights, mode="clip")
            slot_ids[...] = local_ids
            filled.append((part, link, slot))
        filled_ns = _now_ns()
        for part, link, slot in filled:
            self._outbox.post(part, link, slot, filled_ns, self._outbox.budget_us)
        for _, link, _ in filled:
            _ring(link, bells)
        self._outbox.count_sent(begin_ns, filled_ns, _now_ns())

    # -- finish ---------------------------------------------------------------------------------------------------

    def _check_out(self, call: Call, out_TD: torch.Tensor) -> None:
        if out_TD.dtype is not self._dtype or out_TD.shape != (call.num_tokens, self._shape.hidden):
            raise InvalidCall(f"out is {out_TD.dtype} {tuple(out_TD.shape)}, need {self._dtype} [{call.num_tokens}, D]")
        if out_TD.is_cpu is not call.on_host:
            raise InvalidCall(f"out is on {out_TD.device}, x was not")

    def _finish(self, call: Call, out_TD: torch.Tensor) -> None:
        begin_ns = _now_ns()
        target = out_TD if call.on_host or self._staging is None else self._staging.output(call.num_tokens)
        if not target.is_contiguous():
            target = torch.empty_like(out_TD, memory_format=torch.contiguous_format)
        if not call.disjoint:
            self._sum.begin(call.num_tokens)
        if call.num_open:
            self._wait(call, target)
        waited_ns = _now_ns()
        self._combine_ready(call, target)
        if not call.disjoint:
            self._sum.finish(target)
        if target is not out_TD:
            out_TD.copy_(target, non_blocking=True)
            if self._staging is not None and not call.on_host:
                self._staging.output_used()
        call.parts.clear()  # they refer to each other: do not leave them to the garbage collector's pauses
        self._outbox.count_finished(call, begin_ns, waited_ns, _now_ns())

    def _wait(self, call: Call, out_TD: torch.Tensor) -> None:
        """Until every part is answered. What can be combined meanwhile, is."""
        links = self._links
        while call.num_open:
            now_ns = _now_ns()
            if call.trouble or links.has_news or now_ns >= call.check_ns:
                self._recovery.mend(call, now_ns, out_TD)
                if not call.num_open:
                    return
            bells, call.bells = call.bells, []
            links.poll((call.check_ns - now_ns) / 1e9, bells)
            if call.num_open and len(call.parts) > 1:
                self._combine_ready(call, out_TD)

    def _combine_ready(self, call: Call, out_TD: torch.Tensor) -> None:
        """Combine answered parts, strictly in their order, so that the sum does not depend on who was faster."""
        parts = call.parts
        while call.next_part < len(parts) and parts[call.next_part].state == DONE:
            part = parts[call.next_part]
            if not call.disjoint:
                self._sum.add(part.partial(), part.rows)
            elif part.slot is not None and isinstance(part.rows, slice):
                offset = part.rows.start * self._row_bytes
                source = part.slot.reply_address + wire.HEADER_BYTES
                copy(out_TD.data_ptr() + offset, source, part.num_tokens * self._row_bytes)
            else:
                out_TD[part.rows] = part.partial()
            part.state = COMBINED
            part.let_go()
            self.counters.rows_combined += part.num_tokens
            call.next_part += 1
        if self._links.retired:
            self._links.close_idle_retired()

    def _drop(self, call: Call) -> None:
        """A call failed: leave its slots to their late replies."""
        for part in call.parts:
            if part.state != COMBINED:
                self.counters.rows_failed += part.num_tokens
                part.let_go()
        call.parts.clear()


def _ring(link: Link, later: list[int] | None) -> None:
    """Tell the worker now, or have its doorbell rung later if that is all there is to do."""
    if later is None or link.bell < 0:
        link.ring()
    else:
        later.append(link.bell)

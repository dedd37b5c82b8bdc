"""The client's end of a connection to a worker: shared memory with doorbells on one host, TCP otherwise.

A Link owns an arena of slots. The dispatcher takes a slot, writes a request frame into its memory, posts it (which
publishes the slot, or queues its bytes) and rings once. From there on both kinds behave alike: a slot is given back
when its answer was used; abandoned before, it is a zombie that nobody may reuse until its late reply came. Links belong
to the thread that owns the epoll; cluster/connect.py makes them in others.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from cluster import wire
from cluster.errors import (
    BadCallId,
    BadTokenCount,
    BadType,
    ConnectionLost,
    DataPlaneError,
    IntegrityError,
    Truncated,
)
from cluster.routing import Replica
from cluster.shm import Arena, SlotMemory

OnReply = Callable[["Slot", int, int, int, str], None]  # slot, status, compute_ns, queue_ns, text
OnLate = Callable[[str, int, int], None]  # replica_id, compute_ns, queue_ns
Handler = Callable[[int], None]
_SOCKET_EVENTS = select.EPOLLIN | select.EPOLLRDHUP


class Slot(SlotMemory):
    """A slot and the call that is in it. `owner` is the dispatcher's part, or None for a zombie or an idle slot."""

    __slots__ = ("answered", "call_id", "num_tokens", "owner", "sent_ns", "sequence")

    def __init__(self, arena: Arena, index: int) -> None:
        super().__init__(arena, index)
        self.sequence = 0
        self.call_id = 0
        self.num_tokens = 0
        self.sent_ns = 0
        self.answered = False
        self.owner: Any = None


class Link:
    """One authenticated connection to one replica."""

    def __init__(self, replica: Replica, sock: socket.socket, arena: Arena) -> None:
        self.replica = replica
        self.sock = sock
        self.arena = arena
        self.agreement = arena.agreement
        self.hidden, self.top_k, self.dtype_code = self.agreement.hidden, self.agreement.top_k, self.agreement.code
        self.buffer = arena.buffer
        self.free = [Slot(arena, i) for i in reversed(range(arena.agreement.num_slots))]
        self.busy: list[Slot] = []
        self.outstanding_tokens = 0
        self.num_late_replies = 0
        self.bell = -1  # the eventfd that ring() writes to, if that is all it does
        self.alive = True
        self.retired = False  # not in the table any more: close when the last open call is done
        self.on_reply: OnReply = _nobody
        self.on_late: OnLate = _nobody
        self.epoll: select.epoll | None = None

    def take(self, owner: Any, num_tokens: int) -> Slot:
        """An idle slot for a call of `num_tokens`. The caller made sure that `free` is not empty."""
        slot = self.free.pop()
        slot.owner = owner
        slot.num_tokens = num_tokens
        slot.answered = False
        self.busy.append(slot)
        self.outstanding_tokens += num_tokens
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's answer was used (or its call never posted): it may carry the next call."""
        slot.owner = None
        self.busy.remove(slot)
        self.free.append(slot)
        self.outstanding_tokens -= slot.num_tokens

    def abandon(self, slot: Slot) -> None:
        """Nobody wants the answer any more. An unanswered slot is reused only after its late reply came."""
        if slot.answered:
            self.give_back(slot)
        else:
            slot.owner = None

    @property
    def is_stuck(self) -> bool:
        """No slot is idle, and every one waits for an answer that nobody wants any more."""
        return not self.free and all(slot.owner is None for slot in self.busy)

    def unanswered_since_ns(self) -> int | None:
        """When the oldest call was sent whose answer nobody waits for and that has not come; None: there is none."""
        return min((slot.sent_ns for slot in self.busy if slot.owner is None), default=None)

    def write_header(self, slot: Slot, call_id: int, layer: int, budget_us: int, sent_ns: int) -> None:
        slot.call_id = call_id
        slot.sent_ns = sent_ns
        n = slot.num_tokens
        wire.pack_request_into(
            self.buffer, slot.request_offset, wire.REQUEST_WORD, slot.frame(n)[0], layer, call_id, n, budget_us,
            self.hidden, self.top_k, self.dtype_code, 0, sent_ns, 0, 0,
        )  # fmt: skip

    def post(self, slot: Slot) -> None:
        """Make a slot whose frame is complete known to the peer, who need not look before ring()."""
        raise NotImplementedError

    def ring(self) -> None:
        raise NotImplementedError

    def handlers(self) -> list[tuple[int, int, Handler]]:
        """(descriptor, events, handler) to watch. Handlers raise DataPlaneError or OSError when the link is lost."""
        raise NotImplementedError

    def close(self) -> None:
        """Close descriptors and drop views. Memory that a part still reads from stays until it lets go."""
        if not self.alive:
            return
        self.alive = False
        if self.epoll is not None:  # a doorbell lives on in the peer: closing our end would unregister nothing
            for fd, _, _ in self.handlers():
                self.epoll.unregister(fd)
            self.epoll = None
        self._close_descriptors()
        self.buffer = None  # type: ignore[assignment]
        for slot in (*self.busy, *self.free):
            slot.close()
        self.arena.close()

    def _close_descriptors(self) -> None:
        self.sock.close()

    def check_integrity(self, owners: Collection[object]) -> None:
        """Raise IntegrityError unless every slot is idle, a zombie, or held by one of `owners`."""
        name = self.replica.replica_id
        if len(self.free) + len(self.busy) != self.agreement.num_slots:
            raise IntegrityError(f"{name}: {len(self.free)} idle + {len(self.busy)} busy slots of {self.agreement}")
        if self.outstanding_tokens != sum(slot.num_tokens for slot in self.busy):
            raise IntegrityError(f"{name}: {self.outstanding_tokens} outstanding tokens do not match its busy slots")
        for slot in self.busy:
            if slot.owner is not None and slot.owner not in owners:
                raise IntegrityError(f"{name}: slot {slot.index} is held by a call that is over")

    def _accept_reply(self, slot: Slot, fields: tuple[int, int, int, int, int, int]) -> None:
        """A checked reply header belongs to this slot: hand it on, or free a zombie."""
        call_id, status, num_tokens, text_bytes, compute_ns, queue_ns = fields
        if call_id != slot.call_id:
            raise BadCallId(f"reply to call {call_id} in the slot of call {slot.call_id}")
        if num_tokens != slot.num_tokens:
            raise BadTokenCount(f"reply of {num_tokens} tokens to a request of {slot.num_tokens}")
        text = ""
        if text_bytes:
            start = slot.reply_offset + wire.HEADER_BYTES
            text = wire.read_text(self.buffer[start : start + text_bytes])
        slot.answered = True
        if slot.owner is None:
            self.num_late_replies += 1
            self.give_back(slot)
            self.on_late(self.replica.replica_id, compute_ns, queue_ns)
        else:
            self.on_reply(slot, status, compute_ns, queue_ns, text)


class ShmLink(Link):
    """Frames in shared memory; eventfds as doorbells; the socket only tells that the peer is gone."""

    kind = "shm"

    def __init__(self, replica: Replica, sock: socket.socket, arena: Arena, request_bell: int, reply_bell: int) -> None:
        super().__init__(replica, sock, arena)
        self.words = arena.words
        self.bell = request_bell
        self.reply_bell = reply_bell

    def post(self, slot: Slot) -> None:
        slot.sequence += 1
        self.words[slot.word] = slot.sequence

    def ring(self) -> None:
        os.eventfd_write(self.bell, 1)

    def handlers(self) -> list[tuple[int, int, Handler]]:
        return [
            (self.reply_bell, select.EPOLLIN | select.EPOLLET, self.on_bell),
            (self.sock.fileno(), _SOCKET_EVENTS, self.on_socket),
        ]

    def on_bell(self, _events: int) -> None:
        words = self.words
        for slot in self.busy[:]:
            if not slot.answered and words[slot.word + 8] == slot.sequence:
                self._accept_reply(slot, wire.read_reply(self.buffer, slot.reply_offset, self.agreement))

    def on_socket(self, _events: int) -> None:
        self.on_bell(0)  # an answer that was written before the peer died still counts
        if self.sock.recv(1):
            raise BadType("bytes on the socket of a shared-memory connection")
        raise ConnectionLost("the worker closed the connection")

    def _close_descriptors(self) -> None:
        super()._close_descriptors()
        os.close(self.bell)
        os.close(self.reply_bell)


class TcpLink(Link):
    """Frames on a non-blocking TCP stream, gathered in private memory of the same layout."""

    kind = "tcp"

    def __init__(self, replica: Replica, sock: socket.socket, arena: Arena) -> None:
        super().__init__(replica, sock, arena)
        sock.setblocking(False)
        self._view = memoryview(arena.buffer)
        self._outbox: deque[memoryview] = deque()
        self._head = bytearray(wire.HEADER_BYTES)
        self._target = memoryview(self._head)  # what the next bytes of the stream belong to
        self._fields: tuple[int, int, int, int, int, int] | None = None
        self._slot: Slot | None = None
        self._last_call_id = 0

    def post(self, slot: Slot) -> None:
        self._last_call_id = max(self._last_call_id, slot.call_id)
        start = slot.request_offset
        self._outbox.append(self._view[start : start + slot.frame(slot.num_tokens)[0]])

    def ring(self) -> None:
        """Send what the socket takes now; the rest follows whenever it is writable."""
        outbox = self._outbox
        while outbox:
            try:
                sent = self.sock.send(outbox[0])
            except BlockingIOError:
                sent = 0
            except OSError:
                outbox.clear()  # the end of the connection is also an event: the loss is handled there, once
                return
            if sent < len(outbox[0]):
                outbox[0] = outbox[0][sent:]
                self._watch(_SOCKET_EVENTS | select.EPOLLOUT)
                return
            outbox.popleft()

    def _watch(self, events: int) -> None:
        if self.epoll is not None:
            self.epoll.modify(self.sock.fileno(), events)

    def handlers(self) -> list[tuple[int, int, Handler]]:
        return [(self.sock.fileno(), _SOCKET_EVENTS, self.on_socket)]

    def on_socket(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.ring()
            if not self._outbox:
                self._watch(_SOCKET_EVENTS)
        if events & ~select.EPOLLOUT:
            self._receive()

    def _receive(self) -> None:
        while True:
            try:
                received = self.sock.recv_into(self._target)
            except BlockingIOError:
                return
            if not received:
                inside = self._fields is not None or len(self._target) < wire.HEADER_BYTES
                raise Truncated("the stream ended inside a reply") if inside else ConnectionLost("the worker closed")
            self._target = self._target[received:]
            while not self._target:
                self._advance()

    def _advance(self) -> None:
        """A header or a body is complete: decide where the next bytes go."""
        if self._fields is None:
            self._fields = wire.read_reply(self._head, 0, self.agreement)
            self._target = self._body_target(self._fields)
            return
        fields, slot = self._fields, self._slot
        self._fields = self._slot = None
        self._target = memoryview(self._head)
        if slot is not None:
            self._accept_reply(slot, fields)

    def _body_target(self, fields: tuple[int, int, int, int, int, int]) -> memoryview:
        call_id, status, num_tokens, text_bytes, _, _ = fields
        body_bytes = text_bytes if status != wire.OK else self.agreement.reply_bytes(num_tokens) - wire.HEADER_BYTES
        self._slot = next((s for s in self.busy if s.call_id == call_id and not s.answered), None)
        if self._slot is None:  # nobody waits for it: a doubled reply if we ever asked, nonsense otherwise
            if call_id > self._last_call_id:
                raise BadCallId(f"reply to call {call_id}, which was never made")
            self.num_late_replies += 1
            return memoryview(bytearray(body_bytes))
        if num_tokens != self._slot.num_tokens:
            raise BadTokenCount(f"reply of {num_tokens} tokens to a request of {self._slot.num_tokens}")
        start = self._slot.reply_offset + wire.HEADER_BYTES
        return self._view[start : start + body_bytes]

    def _close_descriptors(self) -> None:
        super()._close_descriptors()
        self._outbox.clear()
        self._target = memoryview(b"")
        self._view.release()


def _nobody(*_: object) -> None:
    raise DataPlaneError("a link was used before it had a dispatcher")

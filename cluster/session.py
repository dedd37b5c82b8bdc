"""The server's end of one connection: handshake, Hello, then requests out of shared memory or off a TCP stream.

A session never blocks and never trusts: whatever the peer sends either becomes a Request or raises a Malformed class,
upon which the server closes this session and counts the reason. It knows nothing of kernels or batches.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from cluster import auth, wire
from cluster.errors import BadCallId, BadDescriptors, BadLength, BadSequence, BadType, Closed, ConnectionLost, Truncated
from cluster.shm import Arena, SlotMemory, arena_bytes, check_doorbell
from cluster.tls import ServerTls, TlsSocket, tls_error

READ, WRITE = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT
_RECV_BYTES_PER_TURN = 1 << 20  # a long frame must not hold up the others' turns
_NUM_DESCRIPTORS = 3


class Request:
    """A call that lies checked in a slot. It is its slot: there is at most one per slot."""

    __slots__ = (
        "_ids_tensors",
        "arrived_ns",
        "call_id",
        "complete",
        "deadline_ns",
        "ids_TK",
        "is_open",
        "layer",
        "memory",
        "num_tokens",
        "sequence",
        "session",
    )

    def __init__(self, session: Session, memory: SlotMemory) -> None:
        a = memory.arena.agreement
        self.session = session
        self.memory = memory
        self.sequence = 0  # shared memory: the request word of the call that is, or was last, in this slot
        self.is_open = False
        self.call_id = self.layer = self.num_tokens = self.arrived_ns = self.deadline_ns = 0
        self.complete = False  # no id is -1
        # Private: the peer cannot change them after the check.
        self.ids_TK = np.empty((a.max_tokens, a.top_k), np.int32)
        self._ids_tensors: dict[int, torch.Tensor] = {}

    def ids_tensor(self) -> torch.Tensor:
        """The ids of this call as a tensor, int32 [T, K]; kept per T, for making one is dear."""
        tensor = self._ids_tensors.get(self.num_tokens)
        if tensor is None:
            if len(self._ids_tensors) >= 128:
                self._ids_tensors.clear()
            tensor = torch.from_numpy(self.ids_TK[: self.num_tokens])
            self._ids_tensors[self.num_tokens] = tensor
        return tensor


class Host(Protocol):
    """What a session needs of its server."""

    secrets: tuple[bytes, ...]
    tls: ServerTls | None
    layers: range
    num_local_experts: int

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None: ...
    def change(self, fd: int, events: int) -> None: ...
    def unwatch(self, fd: int) -> None: ...
    def review(self, hello: wire.Hello) -> str | None:
        """None to welcome this engine, else the reason to refuse it."""

    def welcome(self) -> wire.Welcome: ...
    def submit(self, request: Request) -> None: ...
    def ring_soon(self, bell: int) -> None: ...
    def forget_bell(self, bell: int) -> None: ...
    def end(self, session: Session, error: Exception) -> None: ...


class Session:
    """One connection. Handlers are called by the server's loop, which also catches what they raise."""

    def __init__(self, host: Host, sock: socket.socket, is_unix: bool, now_s: float) -> None:
        sock.setblocking(False)
        self._tls = None if is_unix else host.tls
        self._is_shaking_hands = self._tls is not None
        self.host = host
        self.sock = sock if self._tls is None else self._tls.wrap(sock)
        self.is_unix = is_unix
        self.opened_s = now_s
        self.engine_id = ""
        self.is_open = False  # Hello was accepted
        self.closed = False
        self.refused = False  # close as soon as the Refused frame is out
        self.requests: list[Request] = []
        self.arena: Arena | None = None
        first, *others = host.secrets
        binding = b"" if self._tls is None else self._tls.binding
        self._handshake: auth.ServerHandshake | None = auth.ServerHandshake(first, auth.EXPERT_CALLS, others, binding)
        self._outbox: deque[tuple[memoryview, Request | None]] = deque()
        self._events = READ
        self._inbox = bytearray(auth.PROOF_BYTES)
        self._target = memoryview(self._inbox)
        self._fds: list[int] = []
        self._receiving: Request | None = None
        self._request_bell = self._reply_bell = -1
        host.watch(self.sock.fileno(), READ, self.on_socket)

    def begin(self) -> None:
        """Send the challenge; with TLS, once its handshake is done."""
        if self._handshake is not None and not self._is_shaking_hands:
            self._send(self._handshake.challenge)

    def _shake_hands(self) -> None:
        """One step of the TLS handshake. Raises TlsFailed or ConnectionLost."""
        assert isinstance(self.sock, TlsSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(READ)
        except ssl.SSLWantWriteError:
            self._watch(READ | WRITE)
        except OSError as error:
            raise tls_error(error) from error
        else:
            self._is_shaking_hands = False
            self.begin()

    # -- bytes in -------------------------------------------------------------------------------------------------

    def on_socket(self, events: int) -> None:
        """The socket is readable, writable or dead. Raises DataPlaneError or OSError when the session must end."""
        if self._is_shaking_hands:
            self._shake_hands()
            return
        if events & WRITE:
            self._flush()
        if events & ~WRITE and not self.refused:
            self._receive()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            raise ConnectionLost("the engine closed the connection")

    def _receive(self) -> None:
        left = _RECV_BYTES_PER_TURN
        while (left > 0 or self._has_decrypted()) and not self.refused:
            try:
                received = self._receive_some()
            except BlockingIOError:
                return
            if not received:
                started = self._receiving is not None or len(self._target) < len(self._inbox)
                raise Truncated("the stream ended inside a frame") if started else ConnectionLost("the engine closed")
            left -= received
            self._target = self._target[received:]
            if not self._target:
                self._advance()

    def _has_decrypted(self) -> bool:
        """Bytes that have left the socket, so that epoll will not tell of them."""
        return isinstance(self.sock, TlsSocket) and self.sock.pending() > 0

    def _receive_some(self) -> int:
        if self._handshake is None and not self.is_open and self.is_unix:
            return self._receive_hello_and_descriptors()
        return self.sock.recv_into(self._target)

    def _receive_hello_and_descriptors(self) -> int:
        space = socket.CMSG_SPACE(_NUM_DESCRIPTORS * 4)
        received, ancillary, flags, _ = self.sock.recvmsg_into([self._target], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % 4
                self._fds += np.frombuffer(data[:whole], np.int32).tolist()
        if flags & socket.MSG_CTRUNC or len(self._fds) > _NUM_DESCRIPTORS:
            raise BadDescriptors("more descriptors than Hello carries")
        return received

    def _advance(self) -> None:
        """What was expected is complete."""
        if self._handshake is not None:
            self._send(self._handshake.answer(bytes(self._inbox)))
            self._handshake = None
            self._expect(wire.HELLO_BYTES)
        elif not self.is_open:
            self._on_hello(wire.Hello.decode(bytes(self._inbox)))
        elif self._request_bell >= 0:
            raise BadType("bytes on the socket of a shared-memory connection")
        elif self._receiving is None:
            self._on_tcp_header()
        else:
            request, self._receiving = self._receiving, None
            self._target = memoryview(self._inbox)
            self._check_and_submit(request, time.monotonic_ns())

    def _expect(self, num_bytes: int) -> None:
        self._inbox = bytearray(num_bytes)
        self._target = memoryview(self._inbox)

    # -- Hello ----------------------------------------------------------------------------------------------------

    def _on_hello(self, hello: wire.Hello) -> None:
        why_not = self.host.review(hello)
        if why_not is not None:
            self.refused = True
            self._send(wire.encode_refused(why_not))
            return
        a = hello.agreement
        self.engine_id = hello.engine_id
        if self.is_unix:
            self._adopt_descriptors(hello)
        elif hello.arena_bytes:
            raise BadLength("shared memory announced on TCP")
        self.arena = self.arena or Arena.private(a)
        self.requests = [Request(self, SlotMemory(self.arena, i)) for i in range(a.num_slots)]
        self.is_open = True
        self._expect(1 if self.is_unix else wire.HEADER_BYTES)
        self._send(self.host.welcome().encode())

    def _adopt_descriptors(self, hello: wire.Hello) -> None:
        if len(self._fds) != _NUM_DESCRIPTORS:
            raise BadDescriptors(f"{len(self._fds)} descriptors, Hello carries {_NUM_DESCRIPTORS}")
        if hello.arena_bytes != arena_bytes(hello.agreement):
            raise BadLength(f"arena of {hello.arena_bytes} bytes, {arena_bytes(hello.agreement)} follow from Hello")
        memfd, request_bell, reply_bell = self._fds
        check_doorbell(request_bell)
        check_doorbell(reply_bell)
        self.arena = Arena.adopt(hello.agreement, memfd)
        os.close(self._fds.pop(0))
        self.host.watch(request_bell, select.EPOLLIN | select.EPOLLET, self.on_bell)
        self._request_bell, self._reply_bell = request_bell, reply_bell

    # -- requests -------------------------------------------------------------------------------------------------

    def on_bell(self, _events: int) -> None:
        """Take every request that was published in shared memory."""
        arena = self.arena
        if arena is None:
            raise Closed("session")
        words = arena.words
        for request in self.requests:
            sequence = words[request.memory.word]
            if sequence != request.sequence:
                if request.is_open or sequence != request.sequence + 1:
                    raise BadSequence(f"request word {sequence} after {request.sequence}")
                request.sequence = sequence
                now_ns = time.monotonic_ns()
                sent_ns = self._read_header(request, arena.buffer, request.memory.request_offset, now_ns)
                self._check_and_submit(request, min(sent_ns or now_ns, now_ns))

    def _read_header(self, request: Request, buffer: object, offset: int, now_ns: int) -> int:
        """Check a header and fill `request` from it; returns sent_ns."""
        a = request.memory.arena.agreement
        call_id, layer, num_tokens, budget_us, sent_ns = wire.read_request(buffer, offset, a, self.host.layers)
        for other in self.requests:
            if other.is_open and other.call_id == call_id:
                raise BadCallId(f"call {call_id} is open already")
        request.call_id, request.layer, request.num_tokens = call_id, layer, num_tokens
        request.deadline_ns = budget_us * 1000  # from arrival; made absolute when the request is complete
        return sent_ns

    def _check_and_submit(self, request: Request, arrived_ns: int) -> None:
        n = request.num_tokens
        ids_TK = request.ids_TK[:n]
        ids_TK[...] = request.memory.arrays(n)[2]
        request.complete = wire.check_ids(ids_TK, self.host.num_local_experts)
        request.arrived_ns = arrived_ns
        request.deadline_ns += arrived_ns
        request.is_open = True
        self.host.submit(request)

    def _on_tcp_header(self) -> None:
        request = next((r for r in self.requests if not r.is_open), None)
        if request is None:
            raise BadSequence("more open calls than slots agreed in Hello")
        arena = request.memory.arena
        self._read_header(request, self._inbox, 0, 0)
        start = request.memory.request_offset + wire.HEADER_BYTES
        body_bytes = arena.agreement.request_bytes(request.num_tokens) - wire.HEADER_BYTES
        self._receiving = request
        self._target = memoryview(arena.buffer)[start : start + body_bytes]

    # -- replies --------------------------------------------------------------------------------------------------

    def reply(self, request: Request, status: int, compute_ns: int, queue_ns: int, text: str = "") -> None:
        """Answer a call whose partial sums, if OK, lie in its slot already. Raises OSError or DataPlaneError."""
        if self.closed or self.arena is None:
            return
        memory = request.memory
        buffer, offset = self.arena.buffer, memory.reply_offset
        data = b"" if status == wire.OK else wire.clip_text(text)
        length = wire.HEADER_BYTES + len(data) if data else self.arena.agreement.reply_bytes(request.num_tokens)
        wire.pack_reply_into(
            buffer, offset, wire.REPLY_WORD, length, status, request.call_id, request.num_tokens, len(data),
            compute_ns, queue_ns, 0, 0,
        )  # fmt: skip
        if data:
            buffer[offset + wire.HEADER_BYTES : offset + length] = data
        if self._reply_bell >= 0:
            request.is_open = False
            self.arena.words[memory.word + 8] = request.sequence
            self.host.ring_soon(self._reply_bell)
        else:
            self._outbox.append((memoryview(buffer)[offset : offset + length], request))
            self._flush()

    def _send(self, data: bytes) -> None:
        self._outbox.append((memoryview(data), None))
        self._flush()

    def _flush(self) -> None:
        """Send what the socket takes; a slot is free again once its reply is out."""
        while self._outbox:
            view, request = self._outbox[0]
            try:
                sent = self.sock.send(view)
            except BlockingIOError:
                sent = 0
            if sent < len(view):
                self._outbox[0] = (view[sent:], request)
                break
            self._outbox.popleft()
            if request is not None:
                request.is_open = False
        if self.refused and not self._outbox:
            self.sock.shutdown(socket.SHUT_WR)
            raise Closed("refused")
        self._watch(READ | WRITE if self._outbox else READ)

    def _watch(self, events: int) -> None:
        if events != self._events:
            self.host.change(self.sock.fileno(), events)
            self._events = events

    @property
    def has_output(self) -> bool:
        return bool(self._outbox)

    def close(self) -> None:
        """Unregister and close everything. Memory that a kernel still reads stays mapped until it is done."""
        if self.closed:
            return
        self.closed = True
        self.host.unwatch(self.sock.fileno())
        self.sock.close()
        if self._request_bell >= 0:
            self.host.unwatch(self._request_bell)
            self.host.forget_bell(self._reply_bell)
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._request_bell = self._reply_bell = -1
        self._outbox.clear()
        self._target = memoryview(b"")
        self._receiving = None
        for request in self.requests:
            request.memory.close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None

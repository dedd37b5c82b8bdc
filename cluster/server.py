"""The expert server: one thread that takes calls from every engine and runs one kernel call per layer and turn.

Each turn of the loop collects what is ready, then computes the layer whose oldest call has waited longest, with all
waiting calls of that layer as one batch. A call that is alone is computed in place: its slot's memory is the kernel's
input and its reply's memory the kernel's output.
"""

from __future__ import annotations

import functools
import os
import secrets
import select
import socket
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cluster import auth, wire
from cluster.batching import Batcher, ComputeFn
from cluster.connect import tune_tcp
from cluster.errors import Closed, ConnectionLost, DataPlaneError, HandshakeTimeout, IntegrityError
from cluster.expert_load import encoded
from cluster.gang import Gang
from cluster.measures import Measures
from cluster.routing import Endpoint, host_id
from cluster.session import Request, Session
from cluster.tls import ServerTls

__all__ = ["ComputeFn", "ExpertServer"]

_MAX_SESSIONS = 1024
_SWEEP_S = 0.5


class ExpertServer:
    """Serves one shard over an abstract unix socket (shared memory) and a TCP port. Binds at construction.

    `compute(layer, x_TD, topk_weights_TK f32, local_ids_TK i32, out_TD, complete)` is called in serve_forever's thread,
    in torch's inference mode, and writes the weighted partial sums, in `dtype`, into out_TD; an id of -1 is an expert
    that lives elsewhere and adds nothing; `complete` says that there is none. T is at most max_tokens.
    With `tls` the TCP port speaks TLS. stop(), drain(), take_secrets(), stats() and the like: from any thread.
    """

    def __init__(
        self,
        *,
        compute: ComputeFn,
        secret: bytes,
        model_fingerprint: str,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        layers: range,
        num_local_experts: int,
        tcp_host: str = "127.0.0.1",
        tcp_port: int = 0,
        max_tokens: int,
        handshake_timeout_s: float = 5.0,
        max_strangers: int = 64,
        tls: ServerTls | None = None,
    ) -> None:
        self.secrets: tuple[bytes, ...] = (auth.check_secret(secret),)
        self.tls = tls
        self.layers = layers
        self.num_local_experts = num_local_experts
        self._fingerprint = model_fingerprint
        self._shape = wire.Agreement(hidden_size, top_k, dtype, max_tokens, 1)
        self._batcher = Batcher(compute, self._shape, layers, num_local_experts)
        self._handshake_timeout_s = handshake_timeout_s
        self._max_strangers = max_strangers
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._sessions: dict[int, Session] = {}  # by the socket's descriptor
        self._strangers: OrderedDict[int, Session] = OrderedDict()  # not welcomed yet, oldest first
        self._pending: dict[int, list[Request]] = {}  # by layer, in order of the first arrival
        self._bells: list[int] = []  # engines to be told of replies, when this thread has nothing else to do
        self._counters: Counter[str] = Counter()
        self._measures = Measures(self._shape)
        self._rejected: Counter[str] = Counter()
        self._draining = False
        self._stopping = False
        self._running = False
        self._lock = threading.Lock()  # start and end of life only
        self._drained = threading.Event()
        self._stopped = threading.Event()
        self._next_sweep_s = 0.0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._gang = Gang(self._epoll)
        self.watch(self._wake, select.EPOLLIN, self._on_wake)
        self._listeners = self._listen(tcp_host, tcp_port)

    def _listen(self, tcp_host: str, tcp_port: int) -> list[socket.socket]:
        unix_name = f"switchyard-worker-{os.getpid()}-{secrets.token_hex(8)}"
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind("\0" + unix_name)
        tcp = socket.socket(socket.AF_INET6 if ":" in tcp_host else socket.AF_INET, socket.SOCK_STREAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tcp.bind((tcp_host, tcp_port))
        except OSError:
            unix.close()
            tcp.close()
            os.close(self._wake)
            self._epoll.close()
            raise
        for sock in (unix, tcp):
            sock.listen(128)
            sock.setblocking(False)
            self.watch(sock.fileno(), select.EPOLLIN, functools.partial(self._on_connection, sock))
        self.endpoint = Endpoint(host_id(), unix_name, tcp_host, tcp.getsockname()[1], self.tls is not None)
        return [unix, tcp]

    # -- the loop -------------------------------------------------------------------------------------------------

    def serve_forever(self) -> None:
        """Serve until stop(), then close every connection. Returns at once if stopped before; Closed if run twice."""
        with self._lock:
            if self._stopped.is_set():
                return
            if self._running:
                raise Closed("serve_forever() runs once")
            self._running = True
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
        finally:
            with self._lock:
                self._close()

    def _turn(self) -> None:
        pending = self._pending
        bells, self._bells = self._bells, []
        for fd, events in self._gang.poll(0 if pending else self._patience_s(), 64, bells):
            self._handle(fd, events)
        if pending:
            layer = next(iter(pending))
            self._compute(layer, pending.pop(layer))
        elif self._draining and not self._drained.is_set() and not any(s.has_output for s in self._sessions.values()):
            self._drained.set()
        if self._strangers and time.monotonic() >= self._next_sweep_s:
            self._sweep(time.monotonic())

    def _patience_s(self) -> float:
        return _SWEEP_S if self._strangers or (self._draining and not self._drained.is_set()) else -1.0

    def _handle(self, fd: int, events: int) -> None:
        handler = self._handlers.get(fd)
        if handler is None:  # closed by an earlier event of this turn
            return
        session = getattr(handler, "__self__", None)
        if not isinstance(session, Session):
            handler(events)
            return
        try:
            handler(events)
        except (DataPlaneError, OSError) as e:
            self.end(session, e)
        except Exception as e:  # a mistake of ours, met on one connection, must not end all others
            traceback.print_exc()
            self._rejected["internal_error"] += 1
            self.end(session, ConnectionLost(str(e)))

    def _compute(self, layer: int, waiting: list[Request]) -> None:
        """One kernel call for as many of a layer's waiting calls as fit; the rest waits for the next turn."""
        now_ns = time.monotonic_ns()
        batch: list[Request] = []
        num_tokens = 0
        for i, request in enumerate(waiting):
            if request.session.closed:
                continue
            if now_ns >= request.deadline_ns:
                self._reply(
                    request, wire.EXPIRED, 0, now_ns - request.arrived_ns, "the budget was spent before computing"
                )
            elif batch and num_tokens + request.num_tokens > self._shape.max_tokens:
                self._pending[layer] = waiting[i:]
                break
            else:
                batch.append(request)
                num_tokens += request.num_tokens
        if not batch:
            return
        compute_ns, error = self._batcher.run(layer, batch, num_tokens)
        status = wire.ERROR if error else wire.OK
        for request in batch:
            self._reply(request, status, compute_ns, now_ns - request.arrived_ns, error)
        self._count_batch(layer, batch, num_tokens, now_ns, compute_ns, error)

    def _count_batch(
        self, layer: int, batch: list[Request], num_tokens: int, begin_ns: int, compute_ns: int, error: str
    ) -> None:
        """After the replies left: bookkeeping is not on anybody's critical path."""
        counters = self._counters
        counters["kernel_calls"] += 1
        counters["computed_messages"] += len(batch)
        counters["computed_tokens"] += num_tokens
        counters["compute_ns"] += compute_ns
        self._measures.note(batch, begin_ns, compute_ns)
        if len(batch) > 1:
            counters["batched_messages"] += len(batch)
        if not error:
            self._batcher.count(layer, batch)

    def _reply(self, request: Request, status: int, compute_ns: int, queue_ns: int, text: str = "") -> None:
        self._counters[wire.STATUS_NAMES[status]] += 1
        try:
            request.session.reply(request, status, compute_ns, queue_ns, text)
        except (DataPlaneError, OSError) as e:
            self.end(request.session, e)

    # -- what sessions ask of their host --------------------------------------------------------------------------

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def review(self, hello: wire.Hello) -> str | None:
        """None to welcome an engine, else the reason to refuse it."""
        mine, theirs = self._shape, hello.agreement
        if hello.fingerprint != self._fingerprint:
            return f"this worker holds model {self._fingerprint!r}, the engine wants {hello.fingerprint!r}"
        for name in ("hidden", "top_k", "dtype"):
            if getattr(theirs, name) != getattr(mine, name):
                return f"{name}: this worker has {getattr(mine, name)}, the engine {getattr(theirs, name)}"
        if theirs.max_tokens > mine.max_tokens:
            limits = f"{mine.max_tokens} per message, the engine sends up to {theirs.max_tokens}"
            return f"max_tokens: this worker takes {limits}"
        return None

    def welcome(self) -> wire.Welcome:
        return wire.Welcome(self.layers.start, self.layers.stop, self.num_local_experts, self._shape.max_tokens)

    def ring_soon(self, bell: int) -> None:
        """Ring an engine's doorbell at the end of this turn."""
        self._bells.append(bell)

    def forget_bell(self, bell: int) -> None:
        """The descriptor is about to be closed."""
        self._bells = [other for other in self._bells if other != bell]

    def submit(self, request: Request) -> None:
        self._counters["messages"] += 1
        if self._draining:
            self._reply(request, wire.DRAINING, 0, 0, "this worker is draining")
        else:
            self._pending.setdefault(request.layer, []).append(request)

    def end(self, session: Session, error: Exception) -> None:
        """Close a session and count why. Nothing else notices."""
        if session.closed:
            return
        if session.refused:
            self._counters["refused"] += 1
        elif isinstance(error, DataPlaneError) and not isinstance(error, ConnectionLost):
            self._rejected[error.reason] += 1
        self._sessions.pop(session.sock.fileno(), None)
        self._strangers.pop(session.sock.fileno(), None)
        session.close()

    def _on_connection(self, listener: socket.socket, _events: int) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # gone before we looked, or out of descriptors: the listener stays readable, we try again
            self._counters["failed_accepts"] += 1
            return
        is_unix = sock.family == socket.AF_UNIX
        if len(self._sessions) >= _MAX_SESSIONS:
            self._rejected["too_many_connections"] += 1
            sock.close()
            return
        if not is_unix:
            tune_tcp(sock)
        if len(self._strangers) >= self._max_strangers:  # the oldest goes: idle strangers must not lock out an engine
            _, oldest = next(iter(self._strangers.items()))
            self.end(oldest, HandshakeTimeout("too many unauthenticated connections"))
        self._counters["connections"] += 1
        fd = sock.fileno()
        try:
            session = Session(self, sock, is_unix, time.monotonic())
        except OSError:  # TLS does not begin on a connection that was reset
            self._counters["failed_accepts"] += 1
            sock.close()
            return
        self._sessions[fd] = self._strangers[fd] = session
        try:
            session.begin()
        except (DataPlaneError, OSError) as e:
            self.end(session, e)

    def _sweep(self, now_s: float) -> None:
        """Close strangers that took too long to introduce themselves."""
        self._next_sweep_s = now_s + _SWEEP_S
        for fd, session in list(self._strangers.items()):
            if session.is_open:
                del self._strangers[fd]
            elif now_s - session.opened_s > self._handshake_timeout_s:
                self.end(session, HandshakeTimeout("handshake"))

    def _on_wake(self, _events: int) -> None:
        os.eventfd_read(self._wake)

    # -- control, from any thread ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Make serve_forever() return after the call it is computing. Idempotent."""
        self._stopping = True
        with self._lock:
            if not self._running:
                self._close()
            self._ring_self()

    def drain(self) -> None:
        """Finish what was taken and answer DRAINING to everything new. Returns at once; see wait_drained()."""
        self._draining = True
        with self._lock:
            self._ring_self()

    def take_secrets(self, secrets: Sequence[bytes]) -> None:
        """From now on engines prove one of these; connections that are open stay. Raises ConfigError for a bad one."""
        self.secrets = tuple(map(auth.check_secret, secrets))

    def _ring_self(self) -> None:
        if not self._stopped.is_set():
            os.eventfd_write(self._wake, 1)

    def wait_drained(self, timeout_s: float) -> bool:
        """True once everything that was taken before drain() is answered."""
        return self._drained.wait(timeout_s)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and gauges. `expert_tokens`: int64 [layer - layers.start, local expert]."""
        return {
            **{name: self._counters[name] for name in _COUNTERS},
            "rejected": dict(self._rejected),
            "sessions": len(self._sessions),
            "strangers": len(self._strangers),
            "waiting_messages": sum(len(waiting) for waiting in list(self._pending.values())),
            "draining": self._draining,
            "expert_tokens": np.array(self._batcher.expert_tokens),
        }

    def load(self) -> dict[str, Any]:
        """How busy the worker is: tokens and messages computed since the start and for how long, messages waiting now.

        "expert_tokens" says which experts computed them (cluster/expert_load.py).
        """
        return {
            "expert_tokens": encoded(self._batcher.expert_tokens),
            "tokens": self._counters["computed_tokens"],
            "messages": self._counters["computed_messages"],
            "compute_s": self._counters["compute_ns"] / 1e9,
            "waiting": sum(len(waiting) for waiting in list(self._pending.values())),
        }

    def metrics(self) -> dict[str, Any]:
        """Measures.to_json(). From any thread."""
        waiting = [request for requests in list(self._pending.values()) for request in list(requests)]
        counters = {name: self._counters[name] for name in _COUNTERS}
        return self._measures.to_json(counters, self._rejected, waiting, time.monotonic_ns())

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every message was answered, dropped with its session, or is waiting."""
        c = self._counters
        answered = sum(c[name] for name in wire.STATUS_NAMES.values())
        waiting = sum(len(requests) for requests in list(self._pending.values()))
        if c["messages"] < answered + waiting:
            raise IntegrityError(f"{c['messages']} messages taken, {answered} answered, {waiting} waiting")
        for session in list(self._sessions.values()):
            if session.closed:
                raise IntegrityError("a closed session is still listed")

    def _close(self) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        for session in list(self._sessions.values()):
            self._sessions.pop(session.sock.fileno(), None)
            session.close()
        self._strangers.clear()
        self._pending.clear()
        for listener in self._listeners:
            listener.close()
        self._handlers.clear()
        self._epoll.close()
        os.close(self._wake)
        self._drained.set()


_COUNTERS = (
    "connections", "failed_accepts", "refused", "messages", "kernel_calls", "computed_messages", "computed_tokens",
    "batched_messages", "compute_ns", *wire.STATUS_NAMES.values(),
)  # fmt: skip

"""Faults on order: the kinds that the fault suite tries on a running cluster, and the worker that commits them.

An expert worker is a SabotagedServer only where worker.fault_injection is set. It takes orders over an abstract unix
socket, from processes of the same user only (SO_PEERCRED). A fault lasts as long as the connection that ordered it: a
suite that dies leaves nothing behind. JSON lines: {"fault": name, "count": N or 0 for no end} in; {"struck": true} out,
once, when the fault has met its first call.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from cluster import wire
from cluster.auth import peer
from cluster.batching import ComputeFn
from cluster.errors import ConnectionLost, SwitchyardError
from cluster.server import ExpertServer
from cluster.session import Request

SLOW_FACTOR = 20
_ORDER_LIMIT_S = 5.0
_LENGTH_OFFSET = 8  # of a frame's length, after its first word (cluster/wire.py)


class Fault(enum.Enum):
    """What can befall a process of the cluster."""

    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    SLOW = "slow"
    """Every kernel takes SLOW_FACTOR times as long."""
    WRONG_SHAPE = "wrong-shape"
    """Answers have another number of tokens than the request."""
    NOT_FINITE = "nan"
    """The last token of every answer is NaN."""
    DROPPED_REPLY = "dropped-reply"
    DOUBLED_REPLY = "doubled-reply"
    TRUNCATED_FRAME = "truncated-frame"
    """An answer is shorter than its tokens need."""
    WRONG_SECRET = "wrong-secret"
    """The worker loses its connections and then proves another secret."""
    WRONG_MODEL = "wrong-model"
    """The worker comes back with the experts of another model."""
    ROUTER_LOSS = "router-loss"
    ENGINE_LOSS = "engine-loss"


# What a worker commits itself when it is told to; the others are done to processes from outside.
BY_WORKER = frozenset(Fault) - {Fault.SIGKILL, Fault.SIGSTOP, Fault.ROUTER_LOSS, Fault.ENGINE_LOSS}


class SabotagedServer(ExpertServer):
    """An ExpertServer that serves well until it is told otherwise. order() is thread-safe; all else as its base."""

    def __init__(self, *, compute: ComputeFn, **options: Any) -> None:
        self._true_compute = compute
        self._ordered: tuple[Fault, int, threading.Event] | None = None
        self._adopted: tuple[Fault, int, threading.Event] | None = None
        self._num_left = 0
        super().__init__(compute=self._compute_or_spoil, **options)
        self._true_secrets, self._true_fingerprint = self.secrets, self._fingerprint

    def order(self, fault: Fault | None, count: int = 0) -> threading.Event:
        """Commit a fault of BY_WORKER on the next `count` calls, 0: on all; None ends it. Set when it has struck."""
        struck = threading.Event()
        self._ordered = (fault, count, struck) if fault is not None else None
        with self._lock:
            self._ring_self()
        return struck

    def take_secrets(self, secrets: Sequence[bytes]) -> None:
        super().take_secrets(secrets)
        self._true_secrets = self.secrets

    # -- the server's thread --------------------------------------------------------------------------------------

    def _turn(self) -> None:
        if self._ordered is not self._adopted:
            self._adopt()
        super()._turn()

    def _adopt(self) -> None:
        self._adopted = adopted = self._ordered
        self.secrets, self._fingerprint = self._true_secrets, self._true_fingerprint
        if adopted is None:
            return
        fault, self._num_left, _ = adopted
        if fault is Fault.WRONG_SECRET:
            self.secrets = (os.urandom(32),)
        elif fault is Fault.WRONG_MODEL:
            self._fingerprint = f"not {self._true_fingerprint}"
        else:
            return
        self._strikes(fault)
        for session in list(self._sessions.values()):
            self.end(session, ConnectionLost("sabotaged"))

    def _strikes(self, fault: Fault) -> bool:
        """Whether this call is one that the fault befalls."""
        adopted = self._adopted
        if adopted is None or adopted[0] is not fault:
            return False
        if adopted[1]:
            if not self._num_left:
                return False
            self._num_left -= 1
        adopted[2].set()
        return True

    def _compute_or_spoil(
        self,
        layer: int,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TD: torch.Tensor,
        complete: bool,
    ) -> None:
        begin_s = time.monotonic()
        self._true_compute(layer, x_TD, weights_TK, ids_TK, out_TD, complete)
        if self._strikes(Fault.SLOW):
            time.sleep((SLOW_FACTOR - 1) * (time.monotonic() - begin_s))
        elif self._strikes(Fault.NOT_FINITE):
            out_TD[-1] = float("nan")

    def _reply(self, request: Request, status: int, compute_ns: int, queue_ns: int, text: str = "") -> None:
        if status != wire.OK:
            super()._reply(request, status, compute_ns, queue_ns, text)
        elif self._strikes(Fault.WRONG_SHAPE):
            num_tokens = request.num_tokens
            request.num_tokens = num_tokens - 1 if num_tokens > 1 else num_tokens + 1
            super()._reply(request, status, compute_ns, queue_ns)
            request.num_tokens = num_tokens
        elif self._strikes(Fault.TRUNCATED_FRAME):
            self._truncate(request, compute_ns, queue_ns)
        elif not self._strikes(Fault.DROPPED_REPLY):
            super()._reply(request, status, compute_ns, queue_ns)
            if self._strikes(Fault.DOUBLED_REPLY):
                request.session.reply(request, status, compute_ns, queue_ns)

    def _truncate(self, request: Request, compute_ns: int, queue_ns: int) -> None:
        session, arena = request.session, request.session.arena
        if session.is_unix and arena is not None:
            super()._reply(request, wire.OK, compute_ns, queue_ns)  # its bell is rung at the end of the turn
            offset = request.memory.reply_offset + _LENGTH_OFFSET
            (length,) = struct.unpack_from("<I", arena.buffer, offset)
            struct.pack_into("<I", arena.buffer, offset, length - 1)
        else:
            session.sock.send(bytes(wire.HEADER_BYTES // 2))
            self.end(session, ConnectionLost("sabotaged"))


class Saboteur:
    """Takes orders for a SabotagedServer in daemon threads, until the process ends."""

    def __init__(self, server: SabotagedServer) -> None:
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(_address(os.getpid()))
        self._listener.listen(4)
        threading.Thread(target=self._accept, name="saboteur", daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock,), name="sabotage", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """One order, for as long as its connection lasts."""
        with sock, contextlib.suppress(OSError, ValueError, KeyError):
            if peer(sock).user != os.getuid():
                return
            sock.settimeout(_ORDER_LIMIT_S)
            order = json.loads(sock.makefile("rb").readline())
            struck = self._server.order(Fault(order["fault"]), int(order["count"]))
            try:
                sock.settimeout(0.0)
                while not struck.wait(0.02) and not _is_closed(sock):
                    pass
                sock.settimeout(None)
                sock.sendall(b'{"struck": true}\n')
                sock.recv(1)  # returns when the other side has closed
            finally:
                self._server.order(None)


def _is_closed(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False


class Sabotage:
    """A fault in the worker process `pid` from here on, until close() or until `count` calls have met it.

    Raises ConnectionLost when that process takes no orders.
    """

    def __init__(self, pid: int, fault: Fault, count: int = 0) -> None:
        if fault not in BY_WORKER:
            raise SwitchyardError(f"{fault.value} is not a fault that a worker commits itself")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.connect(_address(pid))
            self._sock.sendall(json.dumps({"fault": fault.value, "count": count}).encode() + b"\n")
        except OSError as error:
            self._sock.close()
            raise ConnectionLost(f"process {pid} takes no faults ({error}): is worker.fault_injection set?") from None

    def wait_struck(self, timeout_s: float) -> bool:
        """True once the fault has met a call; False if it has not in time, or if the process has ended."""
        self._sock.settimeout(timeout_s)
        try:
            return bool(self._sock.recv(64))
        except OSError:
            return False

    def close(self) -> None:
        self._sock.close()


def _address(pid: int) -> str:
    return f"\0switchyard-sabotage-{pid}"

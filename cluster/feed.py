"""Routing tables from an engine's Serve replica to the processes that run its model, over an abstract unix socket.

After the handshake (cluster/auth.py, purpose 2) the feed sends frames: 4 bytes little-endian length, then that many
bytes of JSON, RoutingTable.to_json(). A new subscriber gets the newest table at once; a slow one may miss older tables,
never the newest. A subscriber sends frames of the same form: {"stalled": true} when a layer call has waited for
expert_timeout_s in vain, {"stalled": false} when layer calls go on, {"accused": [replica_id, cause]}, and now and then
{"metrics": Dispatcher.metrics()}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster import auth
from cluster.blame import Cause, OnAccused
from cluster.errors import BadLength, BadText, BadType, Closed, ConnectionLost, DataPlaneError, InvalidTable
from cluster.routing import RoutingTable

_LOG = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
MAX_TABLE_BYTES = 64 << 20
_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_SUBSCRIBERS = 256
_MAX_REPORT_BYTES = 32 << 10
_RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class _Subscriber:
    """The feed's end of one connection."""

    def __init__(self, sock: socket.socket, secret: bytes, now_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.opened_s = now_s
        self.handshake = auth.ServerHandshake(secret, auth.ROUTING_TABLES)
        self.is_open = False
        self.is_stalled = False
        self.metrics: dict[str, Any] | None = None
        self.inbox = bytearray()
        self.outbox = bytearray(self.handshake.challenge)
        self.next_frame: bytes | None = None  # sent when the frame in the outbox is out; only the newest is kept
        self._last_frame: bytes | None = None

    def offer(self, frame: bytes | None) -> None:
        """Send this frame next, unless it was the last that was offered."""
        if frame is not self._last_frame:
            self.next_frame = self._last_frame = frame

    def receive(self) -> list[dict[str, Any]]:
        """Read what is there; returns the reports that are complete."""
        data = self.sock.recv(_MAX_REPORT_BYTES if self.is_open else auth.PROOF_BYTES)
        if not data:
            raise ConnectionLost("the subscriber closed")
        self.inbox += data
        if self.is_open:
            return list(self._reports())
        if len(self.inbox) > auth.PROOF_BYTES:
            raise BadType("a subscriber speaks before it was answered")
        if len(self.inbox) == auth.PROOF_BYTES:
            self.outbox += self.handshake.answer(bytes(self.inbox))
            self.inbox.clear()
            self.is_open = True
        return []

    def _reports(self) -> Iterator[dict[str, Any]]:
        while len(self.inbox) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self.inbox)
            if not 0 < size <= _MAX_REPORT_BYTES:
                raise BadLength(f"a report of {size} bytes")
            if len(self.inbox) < _LENGTH.size + size:
                return
            try:
                report = json.loads(self.inbox[_LENGTH.size : _LENGTH.size + size])
            except ValueError as e:
                raise BadText("a report that is not JSON") from e
            if not isinstance(report, dict):
                raise BadType("a report that is not an object")
            del self.inbox[: _LENGTH.size + size]
            yield report

    def send(self) -> None:
        while self.outbox or (self.is_open and self.next_frame is not None):
            if not self.outbox and self.next_frame is not None:
                self.outbox += self.next_frame
                self.next_frame = None
            try:
                sent = self.sock.send(self.outbox)
            except BlockingIOError:
                return
            del self.outbox[:sent]

    @property
    def events(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)


class TableFeed:
    """Publishes routing tables to every subscriber that knows the secret. All methods are thread-safe.

    `on_stalled` and `on_accused` are called in the feed's thread: on_stalled(True) when layer calls of a first
    subscriber stall, on_stalled(False) when none do; on_accused(replica_id, cause) when one suspects a replica.
    """

    def __init__(
        self,
        secret: bytes,
        name: str | None = None,
        on_stalled: Callable[[bool], None] = lambda _: None,
        on_accused: OnAccused = lambda _replica_id, _cause: None,
    ) -> None:
        self._secret = auth.check_secret(secret)
        self._on_stalled = on_stalled
        self._on_accused = on_accused
        self._is_stalled = False
        self.address = name or f"switchyard-feed-{os.getpid()}-{secrets.token_hex(8)}"
        self.num_rejected = 0
        self._frame: bytes | None = None
        self._epoch = -1
        self._lock = threading.Lock()
        self._closing = False
        self._subscribers: set[_Subscriber] = set()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.address)
        self._listener.listen(32)
        self._listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="switchyard-feed", daemon=True)
        self._thread.start()

    def publish(self, table: RoutingTable) -> None:
        """Send a table to all present and future subscribers. Ignores an older or equal epoch; raises InvalidTable."""
        table.validate()
        data = json.dumps(table.to_json(), separators=(",", ":")).encode()
        if len(data) > MAX_TABLE_BYTES:
            raise InvalidTable(f"a table of {len(data)} bytes")
        with self._lock:
            if self._closing:
                raise Closed("feed")
            if table.epoch > self._epoch:
                self._epoch = table.epoch
                self._frame = _LENGTH.pack(len(data)) + data
                os.eventfd_write(self._wake, 1)

    def metrics(self) -> list[dict[str, Any]]:
        """The newest Dispatcher.metrics() of every subscriber that has sent any."""
        return [subscriber.metrics for subscriber in list(self._subscribers) if subscriber.metrics is not None]

    def close(self) -> None:
        """Disconnect everybody and end the thread. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select(1.0):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fd == self._wake:
                        self._spread()
                    elif key.data in self._subscribers:
                        self._serve(key.data, events)
                self._sweep(time.monotonic())
        finally:
            for subscriber in list(self._subscribers):
                self._end(subscriber)
            self._selector.close()
            self._listener.close()
            with self._lock:  # close() is about to ring it when this thread has seen the flag sooner
                os.close(self._wake)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # gone before we looked, or out of descriptors
            return
        if len(self._subscribers) >= _MAX_SUBSCRIBERS:
            self.num_rejected += 1
            sock.close()
            return
        subscriber = _Subscriber(sock, self._secret, time.monotonic())
        subscriber.offer(self._frame)
        self._subscribers.add(subscriber)
        self._selector.register(sock, subscriber.events, subscriber)

    def _spread(self) -> None:
        os.eventfd_read(self._wake)
        for subscriber in list(self._subscribers):
            subscriber.offer(self._frame)
            self._serve(subscriber, 0)

    def _serve(self, subscriber: _Subscriber, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                for report in subscriber.receive():
                    self._take(subscriber, report)
            subscriber.send()
            self._selector.modify(subscriber.sock, subscriber.events, subscriber)
        except (DataPlaneError, OSError) as e:
            if not isinstance(e, (ConnectionLost, OSError)):
                self.num_rejected += 1
                _LOG.warning("table feed closed a connection: %s", e.reason)
            self._end(subscriber)

    def _take(self, subscriber: _Subscriber, report: dict[str, Any]) -> None:
        match report:
            case {"stalled": bool(is_stalled)}:
                subscriber.is_stalled = is_stalled
                self._judge()
            case {"accused": [str(replica_id), str(cause)]} if cause in {each.value for each in Cause}:
                self._on_accused(replica_id, Cause(cause))
            case {"metrics": dict(metrics)}:
                subscriber.metrics = metrics
            case _:
                raise BadType("a report of an unknown kind")

    def _sweep(self, now_s: float) -> None:
        for subscriber in list(self._subscribers):
            if not subscriber.is_open and now_s - subscriber.opened_s > _HANDSHAKE_TIMEOUT_S:
                self.num_rejected += 1
                self._end(subscriber)

    def _end(self, subscriber: _Subscriber) -> None:
        self._subscribers.discard(subscriber)
        self._selector.unregister(subscriber.sock)
        subscriber.sock.close()
        self._judge()

    def _judge(self) -> None:
        is_stalled = any(subscriber.is_stalled for subscriber in self._subscribers)
        if is_stalled is not self._is_stalled:
            self._is_stalled = is_stalled
            self._on_stalled(is_stalled)


class TableSubscriber:
    """Calls `on_table` in a background thread for every newer table; reconnects for as long as it is open.

    After the feed was restarted the newest table may come again: whoever adopts tables ignores epochs it knows.
    """

    def __init__(self, address: str, secret: bytes, on_table: Callable[[RoutingTable], None]) -> None:
        self._address = address
        self._secret = auth.check_secret(secret)
        self._on_table = on_table
        self._first = threading.Event()
        self._closing = threading.Event()
        self._is_stalled = False
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="switchyard-tables", daemon=True)
        self._thread.start()

    def wait_first(self, timeout_s: float) -> bool:
        """True once the first table was handed to `on_table`; False if that took longer than `timeout_s`."""
        return self._first.wait(timeout_s)

    def report(self, is_stalled: bool) -> None:
        """Tell the feed that layer calls stall, or go on; again after a reconnection. Never waits."""
        self._is_stalled = is_stalled
        self._send({"stalled": is_stalled})

    def accuse(self, replica_id: str, cause: Cause) -> None:
        """Tell the feed whom this process suspects. Never waits; lost if there is no connection."""
        self._send({"accused": [replica_id, cause.value]})

    def publish(self, metrics: dict[str, Any]) -> None:
        """Give the feed this process's newest Dispatcher.metrics(). Never waits; lost if there is no connection."""
        self._send({"metrics": metrics})

    def _send(self, report: dict[str, Any]) -> None:
        with self._lock:
            if self._sock is not None:
                self._send_on(self._sock, report)

    def _send_on(self, sock: socket.socket, report: dict[str, Any]) -> None:
        data = json.dumps(report).encode()
        # A feed that is gone, or does not read, learns of a stall when it is connected again.
        with contextlib.suppress(OSError):
            sock.send(_LENGTH.pack(len(data)) + data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """End the thread; `on_table` is not called after this returns (unless it is what calls). Idempotent."""
        self._closing.set()
        with self._lock:
            if self._sock is not None:
                self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        attempt = 0
        while not self._closing.is_set():
            try:
                self._follow()
                attempt = 0
            except (DataPlaneError, InvalidTable, OSError) as e:
                _LOG.log(
                    logging.DEBUG if isinstance(e, (ConnectionLost, OSError)) else logging.ERROR, "table feed: %r", e
                )
            self._closing.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    def _follow(self) -> None:
        """Read tables from one connection until it ends, which returns if a table came and raises otherwise."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with sock:
            sock.settimeout(_HANDSHAKE_TIMEOUT_S)
            sock.connect("\0" + self._address)
            auth.client_handshake(sock, self._secret, auth.ROUTING_TABLES, time.monotonic() + _HANDSHAKE_TIMEOUT_S)
            sock.settimeout(None)
            with self._lock:
                self._sock = sock
                if self._is_stalled:
                    self._send_on(sock, {"stalled": True})
                if self._closing.is_set():
                    sock.shutdown(socket.SHUT_RDWR)
            try:
                self._read_tables(sock)
            finally:
                with self._lock:
                    self._sock = None

    def _read_tables(self, sock: socket.socket) -> None:
        num_tables = 0
        with sock.makefile("rb") as stream:
            while head := stream.read(_LENGTH.size):
                if len(head) < _LENGTH.size:
                    break
                (size,) = _LENGTH.unpack(head)
                if not 0 < size <= MAX_TABLE_BYTES:
                    raise BadLength(f"a table of {size} bytes")
                data = stream.read(size)
                if len(data) < size:
                    break
                self._hand_over(data)
                num_tables += 1
        if not num_tables:
            raise ConnectionLost("the feed closed before it sent a table")

    def _hand_over(self, data: bytes) -> None:
        try:
            table = RoutingTable.from_json(json.loads(data))
        except ValueError as e:
            raise BadText("a table that is not JSON") from e
        if not self._closing.is_set():
            self._on_table(table)
            self._first.set()

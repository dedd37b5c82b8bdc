"""The dispatcher's connections: kept equal to the newest routing table, opened off the engine's thread.

update() runs in a feed's thread; short-lived daemon threads connect; everything else belongs to the engine's thread,
which absorbs what they prepared at its next layer call, or while it waits for a replica.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cluster.auth import Secret, current
from cluster.blame import Cause, Suspicions
from cluster.connect import connect
from cluster.errors import Closed, ConnectionLost, DataPlaneError, InvalidTable, Malformed, Refused, WrongSecret
from cluster.gang import Gang
from cluster.plan import Plan
from cluster.routing import Replica, ReplicaState, Role, RoutingTable
from cluster.transport import Handler, Link, OnReply
from cluster.wire import Agreement

_LOG = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 2.0
_FIRST_ATTEMPT_WAIT_S = 0.25
# Without a connection for so long, a replica that is still in the table is accused, and again each time it has passed.
_UNREACHABLE_AFTER_S = 2.0
_RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

OnDown = Callable[[Link, Exception], None]


class Links:
    """Owns the plan, the links and the epoll that watches them."""

    def __init__(
        self,
        agreement: Agreement,
        engine_id: str,
        secret: Secret,
        suspicions: Suspicions,
        on_reply: OnReply,
        on_down: OnDown,
        overdue_ns: int,
    ) -> None:
        self._agreement = agreement
        self._engine_id = engine_id
        self._secret = secret
        self.suspicions = suspicions
        self._on_reply = on_reply
        self._on_down = on_down
        self._overdue_ns = overdue_ns  # after that, an answer that nobody waits for will never come
        self.plan: Plan | None = None
        self.by_replica: dict[
            Replica, Link
        ] = {}  # key: the replica as if ONLINE, so that a change of state keeps its link
        self.retired: list[Link] = []
        self.has_news = False  # set last by other threads, read first by the engine's
        self.num_lost = 0
        self._late_of_closed = 0
        self.refusals: dict[str, str] = {}
        self._changed = threading.Condition()
        self._next_table: RoutingTable | None = None
        self._newest: RoutingTable | None = None
        self._fresh: list[Link] = []
        self._connecting: dict[Replica, int] = {}  # replica -> attempts so far
        self._known: set[Replica] = set()  # replicas with a link, seen from other threads
        self._closed = False
        self._handlers: dict[int, tuple[Handler, Link | None]] = {}
        self._epoll = select.epoll()
        self._gang = Gang(self._epoll)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN | select.EPOLLET)
        self._handlers[self._wake] = (_ignore, None)

    # -- any thread -----------------------------------------------------------------------------------------------

    def update(self, table: RoutingTable) -> None:
        """Connect to what is new, then publish the table. Returns at once for an older or equal epoch.

        Blocks (not the engine) until every new replica was tried once, or, after 0.25 s, as soon as each shard has one.
        """
        table.validate()
        with self._changed:
            if self._closed:
                raise Closed("dispatcher")
            if self._newest is not None:
                if table.epoch <= self._newest.epoch:
                    return
                _require_same_model(self._newest, table)
            self._newest = table
            self.refusals = {}
            for replica in _online(table):
                self._connect_soon(replica)
            begin_s = time.monotonic()
            while self._newest is table and not self._closed and self._should_wait(table, time.monotonic() - begin_s):
                self._changed.wait(0.05)
            if self._newest is table:
                self._next_table = table
                self._announce()

    def _should_wait(self, table: RoutingTable, waited_s: float) -> bool:
        untried = [r for r in _online(table) if self._connecting.get(r) == 0]
        if not untried or waited_s >= _CONNECT_TIMEOUT_S:
            return False
        served = {r.shard_id for r in self._known if r in _online(table)}
        return waited_s < _FIRST_ATTEMPT_WAIT_S or len(served) < len(table.shards)

    def _announce(self) -> None:
        self.has_news = True
        self._changed.notify_all()
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    def _connect_soon(self, replica: Replica) -> None:
        """Start a thread that connects to a replica until it succeeds or the table drops it. Needs the lock."""
        if replica in self._connecting or replica in self._known or self._closed:
            return
        self._connecting[replica] = 0
        name = f"switchyard-connect-{replica.replica_id}"
        threading.Thread(target=self._keep_connecting, args=(replica,), name=name, daemon=True).start()

    def _keep_connecting(self, replica: Replica) -> None:
        attempt = 0
        accuse_s = time.monotonic() + _UNREACHABLE_AFTER_S
        while True:
            link = self._try_connect(replica)
            if link is None and time.monotonic() > accuse_s and self._newest and replica in _online(self._newest):
                accuse_s += _UNREACHABLE_AFTER_S
                self.suspicions.on_accused(replica.replica_id, Cause.UNREACHABLE)
            with self._changed:
                attempt += 1
                self._connecting[replica] = attempt
                if link is not None and not self._closed:
                    self._known.add(replica)
                    self._fresh.append(link)
                wanted = not self._closed and self._newest is not None and replica in _online(self._newest)
                if link is not None or not wanted or replica.replica_id in self.refusals:
                    del self._connecting[replica]
                    if link is not None and self._closed:
                        link.close()
                    self._announce()
                    return
                self._changed.notify_all()
                self._changed.wait(_RETRY_S[min(attempt - 1, len(_RETRY_S) - 1)])

    def _try_connect(self, replica: Replica) -> Link | None:
        table = self._newest
        shard = next((s for s in table.shards if s.shard_id == replica.shard_id), None) if table else None
        if table is None or shard is None:
            return None
        try:
            return connect(
                replica,
                shard,
                self._agreement,
                self._engine_id,
                table.model_fingerprint,
                current(self._secret),
                _CONNECT_TIMEOUT_S,
            )
        except (Refused, WrongSecret) as e:
            if replica.replica_id not in self.refusals:
                cause = Cause.REFUSED if isinstance(e, Refused) else Cause.WRONG_SECRET
                _LOG.error("replica %s: %s: %s", replica.replica_id, cause.value, e)
                self.suspicions.on_accused(replica.replica_id, cause)
            self.refusals[replica.replica_id] = str(e)
        except (DataPlaneError, OSError) as e:
            _LOG.debug("replica %s: %s", replica.replica_id, e)
        return None

    # -- the engine's thread --------------------------------------------------------------------------------------

    def absorb(self) -> None:
        """Adopt the newest published table and the connections that were made since."""
        with self._changed:
            self.has_news = False
            table, self._next_table = self._next_table, None
            fresh, self._fresh = self._fresh, []
        for link in fresh:
            self._install(link)
        if table is not None:
            self.plan = Plan(table, self.plan)
        now_ns = time.monotonic_ns()
        self._reconnect_the_silent(now_ns)
        self.refill_routes()
        self.suspicions.review_ns = min([self.suspicions.review_ns, *self._overdue_at_ns()])

    def _reconnect_the_silent(self, now_ns: int) -> None:
        """A lost answer blocks its slot for good; a new connection has all of them again."""
        for link in list(self.by_replica.values()):
            since_ns = link.unanswered_since_ns()
            if since_ns is not None and now_ns >= since_ns + self._overdue_ns:
                self.lose(link, ConnectionLost("an answer has not come and never will"))

    def _overdue_at_ns(self) -> Iterator[int]:
        """When each link with an unanswered call is to be given up."""
        for link in self.by_replica.values():
            since_ns = link.unanswered_since_ns()
            if since_ns is not None:
                yield since_ns + self._overdue_ns

    def _install(self, link: Link) -> None:
        self.by_replica[link.replica] = link
        link.on_reply = self._on_reply
        link.on_late = self.suspicions.explain
        link.epoll = self._epoll
        for fd, events, handler in link.handlers():
            self._handlers[fd] = (handler, link)
            self._epoll.register(fd, events)

    def refill_routes(self) -> None:
        """Make every route's links those of the plan's ONLINE replicas; retire links that the table no longer has."""
        if self.plan is None:
            return
        now_ns = time.monotonic_ns()
        self.suspicions.reviewed(now_ns)
        listed = {_key(r): r.state for r in self.plan.table.replicas if r.state is not ReplicaState.GONE}
        for route in self.plan.routes.values():
            route.links, route.shadows, route.suspects = [], [], []
        for key, link in list(self.by_replica.items()):
            state = listed.get(key)
            if state is None:
                self._retire(key, link)
            elif state is ReplicaState.ONLINE:
                route = self.plan.routes[key.shard_id]
                if self.suspicions.is_suspected(key.replica_id, now_ns):
                    route.suspects.append(link)
                elif key.role is Role.SHADOW:
                    route.shadows.append(link)
                else:
                    route.links.append(link)

    def _retire(self, key: Replica, link: Link) -> None:
        newest = self._newest
        if newest is not None and key in {_key(r) for r in newest.replicas if r.state is not ReplicaState.GONE}:
            return  # connected for a table that is not published yet
        del self.by_replica[key]
        self.suspicions.acquit(key.replica_id)
        with self._changed:
            self._known.discard(key)
        link.retired = True
        self.retired.append(link)
        self.close_idle_retired()

    def close_idle_retired(self) -> None:
        """Close retired links on which nobody waits for an answer."""
        for link in self.retired[:]:
            if not any(slot.owner is not None for slot in link.busy):
                self.retired.remove(link)
                self._close(link)

    def poll(self, timeout_s: float, bells: Sequence[int] = ()) -> None:
        """Ring `bells`, wait for replies, lost workers or news, up to `timeout_s`, and hand them on."""
        for fd, events in self._gang.poll(timeout_s, 16, bells):
            entry = self._handlers.get(fd)
            if entry is None:
                continue
            handler, link = entry
            try:
                handler(events)
            except (DataPlaneError, OSError) as e:
                assert link is not None
                self.lose(link, e)

    def lose(self, link: Link, error: Exception) -> None:
        """A link is dead: its open calls are news for the dispatcher, and a new connection is tried at once."""
        if not link.alive:
            return
        self.num_lost += 1
        _LOG.warning("lost replica %s (%s): %s", link.replica.replica_id, type(error).__name__, error)
        if isinstance(error, Malformed):
            self.suspicions.accuse(link.replica.replica_id, Cause.MALFORMED, time.monotonic_ns())
        self._on_down(link, error)
        self._close(link)
        if link in self.retired:
            self.retired.remove(link)
            return
        key = link.replica
        del self.by_replica[key]
        self.refill_routes()
        with self._changed:
            self._known.discard(key)
            if self._newest is not None and key in _online(self._newest):
                self._connect_soon(key)

    def _close(self, link: Link) -> None:
        if link.alive:
            for fd, _, _ in link.handlers():
                self._handlers.pop(fd, None)
            self._late_of_closed += link.num_late_replies
        link.close()

    def num_late_replies(self) -> int:
        """Answers that came after their call was abandoned, and were dropped."""
        return self._late_of_closed + sum(link.num_late_replies for link in self.all())

    def all(self) -> list[Link]:
        return [*self.by_replica.values(), *self.retired]

    def close(self) -> None:
        """Close everything; connecting threads end by themselves within their timeout."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            fresh, self._fresh = self._fresh, []
        for link in (*fresh, *self.all()):
            self._close(link)
        self.by_replica.clear()
        self.retired.clear()
        self._handlers.clear()
        self._epoll.close()
        os.close(self._wake)


def _key(replica: Replica) -> Replica:
    """The replica as if ONLINE: what a link is filed under."""
    return replica if replica.state is ReplicaState.ONLINE else replace(replica, state=ReplicaState.ONLINE)


def _online(table: RoutingTable) -> set[Replica]:
    return {r for r in table.replicas if r.state is ReplicaState.ONLINE}


def _require_same_model(old: RoutingTable, new: RoutingTable) -> None:
    for name in ("model_fingerprint", "num_layers", "num_experts"):
        if getattr(old, name) != getattr(new, name):
            raise InvalidTable(
                f"{name} changed from {getattr(old, name)} to {getattr(new, name)}; an engine serves one model"
            )


def _ignore(_events: int) -> None:
    """Being woken is the news."""

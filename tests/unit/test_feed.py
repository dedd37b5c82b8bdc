"""Routing tables on their way from the engine's Serve replica to its subprocesses: real sockets, real threads."""

import queue
import socket
import time
from collections.abc import Iterator

import pytest

from cluster import auth
from cluster.blame import Cause
from cluster.errors import Closed, ConfigError, ConnectionLost, InvalidTable, WrongSecret
from cluster.fakes import eventually
from cluster.feed import TableFeed, TableSubscriber
from cluster.placement import partition
from cluster.routing import RoutingTable

SECRET = b"a secret of more than 16 bytes"


def table(epoch: int) -> RoutingTable:
    return RoutingTable(epoch, "m", 2, 4, partition(2, 4, 2), ())


@pytest.fixture
def feed() -> Iterator[TableFeed]:
    feed = TableFeed(SECRET)
    yield feed
    feed.close()


def test_tables_reach_early_and_late_subscribers_in_order(feed):
    early: queue.Queue[RoutingTable] = queue.Queue()
    first = TableSubscriber(feed.address, SECRET, early.put)
    assert not first.wait_first(0.02)
    feed.publish(table(1))
    assert first.wait_first(5) and early.get(timeout=5) == table(1)
    feed.publish(table(2))
    assert early.get(timeout=5) == table(2)
    feed.publish(table(1))  # older: ignored
    late: queue.Queue[RoutingTable] = queue.Queue()
    second = TableSubscriber(feed.address, SECRET, late.put)
    assert second.wait_first(5) and late.get(timeout=5) == table(2)
    feed.publish(table(3))
    assert early.get(timeout=5) == late.get(timeout=5) == table(3)
    first.close()
    second.close()
    assert early.empty() and late.empty()


def test_a_subscriber_comes_back_when_the_feed_does():
    seen: queue.Queue[RoutingTable] = queue.Queue()
    first = TableFeed(SECRET)
    first.publish(table(1))
    subscriber = TableSubscriber(first.address, SECRET, seen.put)
    assert seen.get(timeout=5) == table(1)
    first.close()
    second = TableFeed(SECRET, name=first.address)
    second.publish(table(2))
    assert seen.get(timeout=5) == table(2)
    subscriber.close()
    second.close()


def test_the_feed_knows_whether_any_subscriber_is_stalled():
    news: queue.Queue[bool] = queue.Queue()
    heard: queue.Queue[str] = queue.Queue()
    feed = TableFeed(SECRET, on_stalled=news.put, on_accused=lambda replica_id, _cause: heard.put(replica_id))
    feed.publish(table(1))
    subscribers = [TableSubscriber(feed.address, SECRET, lambda _: None) for _ in range(2)]
    assert all(subscriber.wait_first(5) for subscriber in subscribers)

    def report(which: int, is_stalled: bool) -> None:
        """Returns when the feed has taken it: reports of different connections come in any order."""
        subscribers[which].report(is_stalled)
        subscribers[which].accuse("taken", Cause.SILENT)
        assert heard.get(timeout=5) == "taken"

    report(0, is_stalled=True)
    assert news.get(timeout=5) is True
    report(1, is_stalled=True)
    report(0, is_stalled=False)
    assert news.empty()
    report(1, is_stalled=False)
    assert news.get(timeout=5) is False
    report(1, is_stalled=True)
    assert news.get(timeout=5) is True
    subscribers[1].close()  # its process has ended
    assert news.get(timeout=5) is False
    subscribers[0].close()
    feed.close()
    assert news.empty()


def test_a_stall_is_told_again_to_a_feed_that_came_back():
    news: queue.Queue[bool] = queue.Queue()
    first = TableFeed(SECRET)
    first.publish(table(1))
    subscriber = TableSubscriber(first.address, SECRET, lambda _: None)
    assert subscriber.wait_first(5)
    subscriber.report(is_stalled=True)
    first.close()
    second = TableFeed(SECRET, name=first.address, on_stalled=news.put)
    assert news.get(timeout=5) is True
    subscriber.close()
    second.close()


def test_the_wrong_secret_sees_no_table(feed):
    feed.publish(table(1))
    subscriber = TableSubscriber(feed.address, b"some other secret of bytes", lambda _: pytest.fail("got a table"))
    assert eventually(lambda: feed.num_rejected > 0)
    assert not subscriber.wait_first(0.01)
    subscriber.close()


def connect(feed: TableFeed) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect("\0" + feed.address)
    return sock


def test_strangers_are_closed_and_nobody_else_notices(feed):
    seen: queue.Queue[RoutingTable] = queue.Queue()
    subscriber = TableSubscriber(feed.address, SECRET, seen.put)
    for noise in (b"GET / HTTP/1.1\r\nHost: example.org\r\n" * 3, bytes(72), b"SWYP" + bytes(68)):
        with connect(feed) as sock:
            sock.sendall(noise)
            sock.settimeout(5)
            with pytest.raises((ConnectionResetError, ConnectionLost, EOFError)):
                while sock.recv(100):
                    pass
                raise EOFError
    with connect(feed) as sock, pytest.raises(ConnectionLost):  # the right secret for another service
        auth.client_handshake(sock, SECRET, auth.EXPERT_CALLS, time.monotonic() + 5)
    assert feed.num_rejected == 4
    feed.publish(table(7))
    assert seen.get(timeout=5) == table(7)
    subscriber.close()


def test_a_false_feed_is_not_believed():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0switchyard-false-feed-test")
        listener.listen()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect("\0switchyard-false-feed-test")
        server, _ = listener.accept()
        server.sendall(auth.ServerHandshake(b"a guess at the secret", auth.ROUTING_TABLES).challenge)
        server.sendall(b"SWYA\1\0\0\0" + bytes(32))
        with pytest.raises(WrongSecret):
            auth.client_handshake(client, SECRET, auth.ROUTING_TABLES, time.monotonic() + 5)
        client.close()
        server.close()


def test_closing_is_final_and_settings_are_checked(feed):
    with pytest.raises(InvalidTable):
        feed.publish(RoutingTable(1, "m", 2, 4, (), ()))
    with pytest.raises(ConfigError):
        TableFeed(b"short")
    feed.close()
    feed.close()
    with pytest.raises(Closed):
        feed.publish(table(1))

"""The dispatcher against workers that break the rules: scripted peers on real sockets."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cluster import auth, wire
from cluster.dispatcher import Dispatcher
from cluster.errors import ExpertsUnavailable
from cluster.fakes import ThreadWorker, ToyShape, eventually
from cluster.placement import partition
from cluster.routing import Endpoint, Replica, ReplicaState

SHAPE = ToyShape(hidden=8, max_tokens=4)
SHARD = partition(SHAPE.num_layers, SHAPE.num_experts, 1)[0]
AGREED = wire.Agreement(SHAPE.hidden, SHAPE.top_k, SHAPE.dtype, SHAPE.max_tokens, 2)
Script = Callable[[socket.socket, bytes], None]


class FalseWorker:
    """A TCP peer that knows the secret, says Welcome, and then answers each request with `script(sock, frame)`."""

    def __init__(self, script: Script, welcome: bytes | None = None, secret: bytes = SHAPE.secret) -> None:
        self._script, self._secret = script, secret
        self._welcome = welcome or wire.Welcome(0, SHAPE.num_layers, SHAPE.num_experts, SHAPE.max_tokens).encode()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    self._serve(sock)
                except Exception:  # the peer closed on us, as it should
                    continue

    def _serve(self, sock: socket.socket) -> None:
        until_s = time.monotonic() + 10
        handshake = auth.ServerHandshake(self._secret, auth.EXPERT_CALLS)
        sock.sendall(handshake.challenge)
        sock.sendall(handshake.answer(auth.receive_exactly(sock, auth.PROOF_BYTES, until_s)))
        hello = wire.Hello.decode(auth.receive_exactly(sock, wire.HELLO_BYTES, until_s))
        sock.sendall(self._welcome)
        while True:
            head = auth.receive_exactly(sock, wire.HEADER_BYTES, until_s)
            num_tokens = wire.read_request(head, 0, hello.agreement, range(99))[2]
            body = auth.receive_exactly(sock, hello.agreement.request_bytes(num_tokens) - wire.HEADER_BYTES, until_s)
            self._script(sock, head + body)

    def replica(self, replica_id: str) -> Replica:
        endpoint = Endpoint("elsewhere", "", "127.0.0.1", self._listener.getsockname()[1])
        return Replica(replica_id, 0, endpoint, ReplicaState.ONLINE, 1, "n")

    def close(self) -> None:
        self._listener.close()


def reply(frame: bytes, value: float = 3.0) -> bytearray:
    """A correct answer to a request: every element is `value`."""
    call_id, _, num_tokens, _, _ = wire.read_request(frame, 0, AGREED, range(99))
    answer = bytearray(AGREED.reply_bytes(num_tokens))
    wire.pack_reply_into(answer, 0, wire.REPLY_WORD, len(answer), wire.OK, call_id, num_tokens, 0, 5, 6, 0, 0)
    np.frombuffer(answer, np.float32, offset=wire.HEADER_BYTES)[...] = value
    return answer


def poked(offset: int, layout: str, value: int) -> Script:
    def script(sock: socket.socket, frame: bytes) -> None:
        answer = reply(frame)
        struct.pack_into("<" + layout, answer, offset, value)
        sock.sendall(answer)

    return script


def hang_up(sock: socket.socket, frame: bytes) -> None:
    sock.sendall(reply(frame)[:70])
    sock.close()


BAD_SCRIPTS = {
    "magic": poked(0, "I", 0),
    "version": poked(4, "B", 9),
    "type": poked(5, "B", wire.REQUEST),
    "length": poked(8, "I", 2**31),
    "status": poked(12, "B", 77),
    "a call never made": poked(16, "Q", 10**9),
    "token count": poked(24, "I", 1),
    "text in an OK": poked(28, "I", 4),
    "reserved": poked(60, "B", 1),
    "cut off": hang_up,
    "noise": lambda sock, frame: sock.sendall(b"\x17" * 500),
}


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(
        engine_id="e", secret=SHAPE.secret, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
        max_tokens=SHAPE.max_tokens, expert_timeout_s=10.0,
    )  # fmt: skip
    yield dispatcher
    dispatcher.check_integrity()
    dispatcher.close()


def start(dispatcher: Dispatcher, num_tokens: int = 2) -> int:
    ids_TK = torch.zeros(num_tokens, SHAPE.top_k, dtype=torch.int32)
    return dispatcher.start(0, torch.ones(num_tokens, SHAPE.hidden), torch.ones(num_tokens, SHAPE.top_k), ids_TK)


def finish(dispatcher: Dispatcher, ticket: int, num_tokens: int = 2) -> float:
    out_TD = torch.full((num_tokens, SHAPE.hidden), float("nan"))
    dispatcher.finish(ticket, out_TD)
    assert bool((out_TD == out_TD[0, 0]).all())
    return out_TD[0, 0].item()


@pytest.mark.parametrize("script", BAD_SCRIPTS.values(), ids=BAD_SCRIPTS.keys())
def test_a_worker_that_talks_nonsense_is_left_for_another(dispatcher, script):
    false, good = FalseWorker(script), ThreadWorker(SHAPE, SHARD)
    dispatcher.update(SHAPE.table(1, [SHARD], [false.replica("false")]))
    ticket = start(dispatcher)
    dispatcher.update(SHAPE.table(2, [SHARD], [false.replica("false"), good.replica("good")]))
    assert finish(dispatcher, ticket) == 0.25
    stats = dispatcher.stats()
    assert stats["lost_links"] >= 1 and stats["resent"] >= 1
    false.close()
    good.close()


def test_a_doubled_reply_is_dropped(dispatcher):
    def twice(sock: socket.socket, frame: bytes) -> None:
        sock.sendall(reply(frame, wire.read_request(frame, 0, AGREED, range(99))[0]) * 2)

    false = FalseWorker(twice)
    dispatcher.update(SHAPE.table(1, [SHARD], [false.replica("r")]))
    answers = [finish(dispatcher, start(dispatcher)) for _ in range(10)]
    assert answers == sorted(set(answers))  # each call got its own answer
    stats = dispatcher.stats()
    assert stats["late_replies"] >= 9 and stats["lost_links"] == 0
    false.close()


def test_answers_in_another_order_find_their_calls(dispatcher):
    held: list[bytes] = []

    def in_pairs_backwards(sock: socket.socket, frame: bytes) -> None:
        held.append(frame)
        if len(held) == 2:
            for each in reversed(held):
                sock.sendall(reply(each, wire.read_request(each, 0, AGREED, range(99))[2]))
            held.clear()

    false = FalseWorker(in_pairs_backwards)
    dispatcher.update(SHAPE.table(1, [SHARD], [false.replica("r")]))
    tickets = [start(dispatcher, 1), start(dispatcher, 3)]
    assert finish(dispatcher, tickets[0], 1) == 1.0
    assert finish(dispatcher, tickets[1], 3) == 3.0
    false.close()


@pytest.mark.parametrize("num_layers", [2, 3])
def test_a_worker_that_does_not_hold_the_shard_is_refused_by_us(num_layers):
    dispatcher = Dispatcher(
        engine_id="e", secret=SHAPE.secret, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
        max_tokens=SHAPE.max_tokens, expert_timeout_s=0.1,
    )  # fmt: skip
    welcome = wire.Welcome(0, num_layers, SHAPE.num_experts - (num_layers == 3), SHAPE.max_tokens).encode()
    false = FalseWorker(lambda sock, frame: None, welcome)
    dispatcher.update(SHAPE.table(1, [SHARD], [false.replica("r")]))
    with pytest.raises(ExpertsUnavailable, match="the routing table says"):
        finish(dispatcher, start(dispatcher))
    dispatcher.close()
    false.close()


def test_a_worker_without_the_secret_gets_no_tokens():
    dispatcher = Dispatcher(
        engine_id="e", secret=SHAPE.secret, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
        max_tokens=SHAPE.max_tokens, expert_timeout_s=0.1,
    )  # fmt: skip
    seen: list[bytes] = []
    false = FalseWorker(lambda sock, frame: seen.append(frame), secret=b"a guess at the secret")
    dispatcher.update(SHAPE.table(1, [SHARD], [false.replica("r")]))
    with pytest.raises(ExpertsUnavailable):
        finish(dispatcher, start(dispatcher))
    assert not seen
    dispatcher.close()
    false.close()


def test_large_messages_over_tcp_do_not_deadlock():
    shape = ToyShape(hidden=2048, max_tokens=1024)
    shard = partition(shape.num_layers, shape.num_experts, 1)[0]
    worker = ThreadWorker(shape, shard, tcp=True)
    dispatcher = Dispatcher(
        engine_id="e", secret=shape.secret, hidden_size=shape.hidden, top_k=shape.top_k, dtype=shape.dtype,
        max_tokens=shape.max_tokens, expert_timeout_s=20.0,
    )  # fmt: skip
    dispatcher.update(shape.table(1, [shard], [worker.replica("r")]))
    x_TD, weights_TK = torch.ones(1024, 2048), torch.ones(1024, 2)
    tickets = [dispatcher.start(0, x_TD, weights_TK, torch.full((1024, 2), i, dtype=torch.int64)) for i in range(3)]
    for i, ticket in enumerate(tickets):
        out_TD = torch.empty_like(x_TD)
        dispatcher.finish(ticket, out_TD)
        assert torch.equal(out_TD, torch.full_like(x_TD, 2 * (i + 1) / 8))
    assert eventually(lambda: worker.server.stats()["ok"] == 3)
    dispatcher.check_integrity()
    dispatcher.close()
    worker.close()

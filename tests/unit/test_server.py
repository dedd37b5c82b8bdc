"""The expert server against hostile, broken and slow peers, over real sockets. T tokens, D hidden size, K top_k."""

import fcntl
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster import auth, wire
from cluster.connect import connect
from cluster.dispatcher import Dispatcher
from cluster.errors import ConnectionLost, Refused
from cluster.fakes import ThreadWorker, ToyShape, eventually
from cluster.placement import partition
from cluster.shm import PAGE_BYTES, Arena, arena_bytes, new_doorbell

SHAPE = ToyShape(hidden=8, max_tokens=4)
SHARD = partition(SHAPE.num_layers, SHAPE.num_experts, 1)[0]
AGREED = wire.Agreement(SHAPE.hidden, SHAPE.top_k, SHAPE.dtype, SHAPE.max_tokens, 2)


@pytest.fixture
def worker() -> Iterator[ThreadWorker]:
    worker = ThreadWorker(SHAPE, SHARD)
    yield worker
    worker.close()


@pytest.fixture
def bystander(worker: ThreadWorker) -> Iterator[Dispatcher]:
    """Another engine's dispatcher, whose calls must go on whatever strangers do; checked at the end of the test."""
    dispatcher = Dispatcher(
        engine_id="bystander", secret=SHAPE.secret, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
        max_tokens=SHAPE.max_tokens, expert_timeout_s=10.0,
    )  # fmt: skip
    dispatcher.update(SHAPE.table(1, [SHARD], [worker.replica("r")]))
    ask(dispatcher)
    yield dispatcher
    ask(dispatcher)
    assert dispatcher.stats()["lost_links"] == 0
    dispatcher.check_integrity()
    dispatcher.close()


def ask(dispatcher: Dispatcher) -> None:
    x_TD, weights_TK = torch.ones(2, SHAPE.hidden), torch.ones(2, SHAPE.top_k)
    out_TD = torch.empty_like(x_TD)
    dispatcher.finish(dispatcher.start(0, x_TD, weights_TK, torch.zeros(2, SHAPE.top_k, dtype=torch.int32)), out_TD)
    assert torch.equal(out_TD, torch.full_like(x_TD, 2 / 8))


def rejected(worker: ThreadWorker) -> dict[str, int]:
    return worker.server.stats()["rejected"]


def tcp_socket(worker: ThreadWorker) -> socket.socket:
    return socket.create_connection((worker.server.endpoint.tcp_host, worker.server.endpoint.tcp_port), 5)


def unix_socket(worker: ThreadWorker) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(5)
    sock.connect("\0" + worker.server.endpoint.unix_name)
    return sock


def prove(sock: socket.socket) -> None:
    auth.client_handshake(sock, SHAPE.secret, auth.EXPERT_CALLS, time.monotonic() + 5)
    sock.settimeout(5)


def tcp_session(worker: ThreadWorker, hello: bytes | None = None) -> socket.socket:
    """An authenticated TCP connection that was welcomed."""
    sock = tcp_socket(worker)
    prove(sock)
    sock.sendall(hello or wire.Hello("raw", SHAPE.fingerprint, AGREED, 0).encode())
    wire.Welcome.decode(auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5))
    sock.settimeout(5)
    return sock


def request(call_id: int = 1, num_tokens: int = 2, layer: int = 1, expert: int = 3) -> bytearray:
    frame = bytearray(AGREED.request_bytes(num_tokens))
    wire.write_request(frame, 0, AGREED, call_id, layer, num_tokens, 10**7, 0)
    np.frombuffer(frame, np.float32, num_tokens * SHAPE.hidden, wire.HEADER_BYTES)[...] = 1
    np.frombuffer(frame, np.float32, num_tokens * SHAPE.top_k, AGREED.weights_offset(num_tokens))[...] = 0.5
    np.frombuffer(frame, np.int32, num_tokens * SHAPE.top_k, AGREED.ids_offset(num_tokens))[...] = expert
    return frame


def is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


# -- strangers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_socket", [tcp_socket, unix_socket])
@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n" * 2, "bad_magic"),
        (b"SWYP\x09" + bytes(67), "bad_version"),
        (b"SWYP\x01\x01\x01\x00" + bytes(64), "bad_reserved"),
        (b"SWYP\x01\x01\x00\x00" + bytes(64), "wrong_secret"),
        (b"SWYP\x01\x02\x00\x00" + bytes(64), "wrong_secret"),
    ],
)
def test_strangers_are_closed_and_counted(worker, bystander, open_socket, noise, reason):
    with open_socket(worker) as sock:
        sock.sendall(noise)
        assert is_closed(sock)
    assert eventually(lambda: rejected(worker) == {reason: 1})


def test_a_proof_cannot_be_replayed(worker, bystander):
    def record(sock: socket.socket) -> bytes:
        challenge = auth.receive_exactly(sock, auth.CHALLENGE_BYTES, time.monotonic() + 5)
        nonce = bytes(32)
        return b"SWYP\1\1\0\0" + nonce + auth._mac(SHAPE.secret, b"client", 1, challenge[8:], nonce)

    with tcp_socket(worker) as sock:
        proof = record(sock)
        sock.sendall(proof)
        auth.receive_exactly(sock, auth.ACCEPT_BYTES, time.monotonic() + 5)
    with tcp_socket(worker) as sock:
        record(sock)
        sock.sendall(proof)
        assert is_closed(sock)
    assert eventually(lambda: rejected(worker).get("wrong_secret") == 1)


def test_silent_strangers_are_closed_in_time_and_cannot_lock_anybody_out():
    worker = ThreadWorker(SHAPE, SHARD, handshake_timeout_s=0.2, max_strangers=3)
    silent = [tcp_socket(worker) for _ in range(5)]
    assert eventually(lambda: worker.server.stats()["strangers"] <= 3)
    with tcp_session(worker) as sock:  # an engine still gets in
        sock.sendall(request())
        assert auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5)[5] == wire.REPLY
    assert eventually(lambda: worker.server.stats()["strangers"] == 0)
    assert all(is_closed(sock) for sock in silent)
    assert rejected(worker) == {"handshake_timeout": 5}
    for sock in silent:
        sock.close()
    worker.close()


@pytest.mark.parametrize("open_socket", [tcp_socket, unix_socket])
def test_wrong_models_and_shapes_are_refused_with_the_reason(worker, bystander, open_socket):
    cases = [
        ("another model", AGREED, "holds model 'toy', the engine wants 'another model'"),
        ("toy", wire.Agreement(16, 2, torch.float32, 4, 2), "hidden: this worker has 8, the engine 16"),
        ("toy", wire.Agreement(8, 4, torch.float32, 4, 2), "top_k: this worker has 2, the engine 4"),
        (
            "toy",
            wire.Agreement(8, 2, torch.float16, 4, 2),
            "dtype: this worker has torch.float32, the engine torch.float16",
        ),
        ("toy", wire.Agreement(8, 2, torch.float32, 5, 2), "max_tokens: this worker takes 4 per message"),
    ]
    for fingerprint, agreement, text in cases:
        with open_socket(worker) as sock:
            prove(sock)
            sock.sendall(wire.Hello("raw", fingerprint, agreement, 0).encode())
            head = auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5)
            assert text in auth.receive_exactly(sock, wire.refused_text_bytes(head), time.monotonic() + 5).decode()
            assert is_closed(sock)
    assert eventually(lambda: worker.server.stats()["refused"] == len(cases)) and rejected(worker) == {}


def test_a_shard_that_differs_from_the_table_is_noticed(worker):
    wrong = partition(SHAPE.num_layers, SHAPE.num_experts, 2)[1]
    with pytest.raises(Refused, match="the routing table says"):
        connect(worker.replica("r"), wrong, AGREED, "e", SHAPE.fingerprint, SHAPE.secret, 5.0)
    with pytest.raises(ConnectionLost):
        connect(worker.replica("r"), SHARD, AGREED, "e", SHAPE.fingerprint, b"some other secret of bytes", 5.0)


# -- malformed frames on TCP ----------------------------------------------------------------------------------------

UNCHECKED = {*range(16, 24), *range(28, 32), *range(40, 48)}  # call id, budget and clock: any value is a value


def test_hundreds_of_mutated_headers_close_their_connection_only(worker, bystander):
    rng = random.Random(0)
    num_bad = 0
    for i in range(400):
        frame = request()
        offset = rng.choice([o for o in range(wire.HEADER_BYTES) if o not in UNCHECKED])
        frame[offset] ^= 1 << rng.randrange(8)
        is_layer = offset == 12 and frame[12] < SHAPE.num_layers  # another layer that the worker holds
        with tcp_session(worker) as sock:
            sock.sendall(frame)
            if is_layer:
                assert sock.recv(wire.HEADER_BYTES)[5] == wire.REPLY
            else:
                num_bad += 1
                assert is_closed(sock), offset
        if i % 50 == 0:
            ask(bystander)
    assert eventually(lambda: sum(rejected(worker).values()) == num_bad)
    assert rejected(worker).keys() == {
        "bad_magic", "bad_version", "bad_type", "bad_flags", "bad_length", "bad_layer", "bad_token_count", "bad_hidden",
        "bad_top_k", "bad_dtype", "bad_reserved",
    }  # fmt: skip
    assert eventually(lambda: worker.server.stats()["sessions"] == 1)


def test_random_bytes_after_the_handshake_never_hurt(worker, bystander):
    rng = random.Random(1)
    for _ in range(100):
        noise = rng.randbytes(rng.randrange(64, 700))
        with tcp_session(worker) as sock:
            sock.sendall(noise)
            assert is_closed(sock)
    assert eventually(lambda: sum(rejected(worker).values()) == 100)


@pytest.mark.parametrize("expert", [-2, SHAPE.num_experts, 2**31 - 1, -(2**31)])
def test_bad_expert_ids(worker, bystander, expert):
    with tcp_session(worker) as sock:
        sock.sendall(request(expert=expert))
        assert is_closed(sock)
    assert eventually(lambda: rejected(worker) == {"bad_expert_id": 1})


@pytest.mark.parametrize(("call_ids", "reason"), [((1, 1), "bad_call_id"), ((1, 2, 3), "bad_sequence")])
def test_doubled_call_ids_and_too_many_open_calls(worker, bystander, call_ids, reason):
    with tcp_session(worker) as sock:
        sock.sendall(b"".join(bytes(request(i)) for i in call_ids))  # one segment: the first is still open
        assert is_closed(sock)
    assert eventually(lambda: rejected(worker) == {reason: 1})


def test_frames_may_arrive_byte_by_byte_and_hold_up_nobody(worker, bystander):
    with tcp_session(worker) as sock:
        frame = request(9)
        for i, byte in enumerate(frame):
            sock.sendall(bytes((byte,)))
            if i % 40 == 0:
                ask(bystander)
        reply = auth.receive_exactly(sock, AGREED.reply_bytes(2), time.monotonic() + 5)
        assert wire.read_reply(reply, 0, AGREED)[:3] == (9, wire.OK, 2)
        out_TD = np.frombuffer(reply, np.float32, offset=wire.HEADER_BYTES)
        assert np.array_equal(out_TD, np.full(16, 0.5 * 2 * (4 / 8 + 1), np.float32))


def test_a_stream_that_ends_inside_a_frame(worker, bystander):
    for cut in (1, 63, 64, 100):
        with tcp_session(worker) as sock:
            sock.sendall(request()[:cut])
    assert eventually(lambda: rejected(worker) == {"truncated": 4})


def test_a_spent_budget_is_answered_and_not_computed(worker, bystander):
    with tcp_session(worker) as sock:
        frame = request()
        struct.pack_into("<I", frame, 28, 0)
        before = worker.toy.num_calls
        sock.sendall(frame)
        reply = auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5)
        assert wire.read_reply(reply, 0, AGREED)[1] == wire.EXPIRED and worker.toy.num_calls == before


# -- shared memory --------------------------------------------------------------------------------------------------


class RawShm:
    """A client that may do anything to the memory it shares."""

    def __init__(self, worker: ThreadWorker) -> None:
        self.sock = unix_socket(worker)
        prove(self.sock)
        self.arena, memfd = Arena.create(AGREED)
        self.bells = [new_doorbell(), new_doorbell()]
        hello = wire.Hello("raw", SHAPE.fingerprint, AGREED, arena_bytes(AGREED)).encode()
        auth.send_exactly(self.sock, hello, time.monotonic() + 5, (memfd, *self.bells))
        os.close(memfd)
        wire.Welcome.decode(auth.receive_exactly(self.sock, wire.HEADER_BYTES, time.monotonic() + 5))
        self.sock.settimeout(5)

    def write(self, frame: bytes) -> None:
        self.arena.buffer[PAGE_BYTES : PAGE_BYTES + len(frame)] = bytes(frame)

    def ring(self, word: int = 1) -> None:
        self.arena.words[0] = word
        os.eventfd_write(self.bells[0], 1)

    def close(self) -> None:
        self.sock.close()
        self.arena.close()
        for bell in self.bells:
            os.close(bell)


def test_shared_memory_is_checked_like_hostile_bytes(worker, bystander):
    rng = random.Random(2)
    num_bad = 0
    for _ in range(200):
        raw = RawShm(worker)
        frame = request(layer=0)
        offset = rng.choice([o for o in range(wire.HEADER_BYTES) if o not in UNCHECKED and o != 12])
        frame[offset] ^= 1 << rng.randrange(8)
        raw.write(frame)
        raw.ring()
        assert is_closed(raw.sock), offset
        num_bad += 1
        raw.close()
    assert eventually(lambda: sum(rejected(worker).values()) == num_bad)


@pytest.mark.parametrize("word", [2, 2**63, 2**64 - 1])
def test_sequence_words_that_jump(worker, bystander, word):
    raw = RawShm(worker)
    raw.write(request())
    raw.ring(word)
    assert is_closed(raw.sock) and eventually(lambda: rejected(worker) == {"bad_sequence": 1})
    raw.close()


def test_ids_cannot_be_changed_after_they_were_checked():
    entered, go = threading.Event(), threading.Event()
    seen: list[torch.Tensor] = []

    def compute(layer, x_TD, weights_TK, ids_TK, out_TD, complete):
        entered.set()
        assert go.wait(30)
        seen.append(ids_TK.clone())
        out_TD.zero_()

    worker = ThreadWorker(SHAPE, SHARD, compute=compute)
    raw = RawShm(worker)
    raw.write(request(expert=3))
    raw.ring()
    assert entered.wait(10)
    raw.write(request(expert=10**6))
    raw.arena.words[0] = 2  # and a second call in a slot that is not idle
    go.set()
    os.eventfd_write(raw.bells[0], 1)
    assert eventually(lambda: len(seen) >= 1) and bool((seen[0] == 3).all())
    assert eventually(lambda: len(rejected(worker)) == 1)  # the second call's ids, found when the first was answered
    raw.close()
    worker.close()


def test_bytes_on_the_socket_of_a_shared_memory_connection(worker, bystander):
    raw = RawShm(worker)
    raw.sock.sendall(b"x")
    assert is_closed(raw.sock) and eventually(lambda: rejected(worker) == {"bad_type": 1})
    raw.close()


def memfd(size: int, seals: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def test_wrong_descriptors(worker, bystander):
    size = arena_bytes(AGREED)
    good_bell = new_doorbell
    cases = [
        ([], size),
        ([memfd(size)], size),
        ([memfd(size, seals=False), good_bell(), good_bell()], size),
        ([memfd(size - 4096), good_bell(), good_bell()], size),
        ([good_bell(), good_bell(), good_bell()], size),
        ([memfd(size), memfd(size), good_bell()], size),
        ([memfd(size), os.eventfd(0, 0), good_bell()], size),
        ([memfd(size), good_bell(), good_bell(), good_bell()], size),
    ]
    for fds, announced in cases:
        with unix_socket(worker) as sock:
            prove(sock)
            hello = wire.Hello("raw", SHAPE.fingerprint, AGREED, announced).encode()
            auth.send_exactly(sock, hello, time.monotonic() + 5, tuple(fds))
            assert is_closed(sock), fds
        for fd in fds:
            os.close(fd)
    assert eventually(lambda: rejected(worker) == {"bad_descriptors": len(cases)})
    with unix_socket(worker) as sock:
        prove(sock)
        sock.sendall(wire.Hello("raw", SHAPE.fingerprint, AGREED, 4096).encode())
        assert is_closed(sock)
    assert eventually(
        lambda: rejected(worker).get("bad_descriptors", 0) + rejected(worker).get("bad_length", 0) == len(cases) + 1
    )


# -- life -----------------------------------------------------------------------------------------------------------


def test_draining_finishes_what_was_taken_and_takes_nothing_new():
    entered, go = threading.Event(), threading.Event()

    def compute(layer, x_TD, weights_TK, ids_TK, out_TD, complete):
        entered.set()
        assert go.wait(30)
        out_TD.copy_(x_TD)

    worker = ThreadWorker(SHAPE, SHARD, compute=compute)
    with tcp_session(worker) as sock:
        sock.sendall(request(1))
        assert entered.wait(10)
        worker.server.drain()
        assert not worker.server.wait_drained(0.02)
        sock.sendall(request(2))
        go.set()
        first = auth.receive_exactly(sock, AGREED.reply_bytes(2), time.monotonic() + 5)
        assert wire.read_reply(first, 0, AGREED)[:2] == (1, wire.OK)
        head = auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5)
        assert wire.read_reply(head, 0, AGREED)[:2] == (2, wire.DRAINING)
    assert worker.server.wait_drained(5) and worker.server.stats()["draining"]
    worker.close()


def test_expert_tokens_are_counted_per_layer_and_expert(worker, bystander):
    with tcp_session(worker) as sock:
        for call_id, (layer, expert) in enumerate([(1, 3), (1, 3), (2, 7), (2, -1)], 1):
            sock.sendall(request(call_id, layer=layer, expert=expert))
            auth.receive_exactly(sock, AGREED.reply_bytes(2), time.monotonic() + 5)
    expected = np.zeros((3, 8), np.int64)
    expected[0, 0], expected[1, 3], expected[2, 7] = 4, 8, 4
    assert eventually(lambda: np.array_equal(worker.server.stats()["expert_tokens"], expected))


def test_the_server_survives_a_kernel_that_raises():
    def compute(layer, x_TD, weights_TK, ids_TK, out_TD, complete):
        if layer == 2:
            raise RuntimeError("out of luck")
        out_TD.copy_(x_TD)

    worker = ThreadWorker(SHAPE, SHARD, compute=compute)
    with tcp_session(worker) as sock:
        sock.sendall(request(1, layer=2))
        head = auth.receive_exactly(sock, wire.HEADER_BYTES, time.monotonic() + 5)
        _, status, _, text_bytes, _, _ = wire.read_reply(head, 0, AGREED)
        text = auth.receive_exactly(sock, text_bytes, time.monotonic() + 5)
        assert (status, text) == (wire.ERROR, b"RuntimeError: out of luck")
        sock.sendall(request(2, layer=1))
        assert (
            wire.read_reply(auth.receive_exactly(sock, AGREED.reply_bytes(2), time.monotonic() + 5), 0, AGREED)[1]
            == wire.OK
        )
    worker.close()


def test_stop_works_at_any_time_and_only_once():
    worker = ThreadWorker(SHAPE, SHARD)
    worker.close()
    worker.server.stop()
    worker.server.serve_forever()  # stopped: returns
    with pytest.raises(OSError):
        tcp_socket(worker)
    with pytest.raises(OSError):
        ThreadWorker(SHAPE, SHARD, tcp_host="192.0.2.1")

"""TLS on the data plane: the same answers, an end for whoever sits in between, and strangers that speak anything."""

import contextlib
import random
import socket
import ssl
import threading
import time

import pytest
import torch

from cluster import auth
from cluster.connect import connect
from cluster.dispatcher import Dispatcher
from cluster.errors import ConfigError, ConnectionLost, TlsFailed
from cluster.fakes import ThreadWorker, ToyShape, eventually
from cluster.placement import partition
from cluster.routing import Endpoint, Replica
from cluster.tls import ServerTls, connect_tls, make_certificate, server_tls
from cluster.wire import Agreement

SHAPE = ToyShape(hidden=8, max_tokens=4)
BIG = ToyShape(hidden=2048, max_tokens=1024)
TLS = ServerTls.made()


def shard_of(shape: ToyShape):
    return partition(shape.num_layers, shape.num_experts, 1)[0]


def make_worker(shape: ToyShape = SHAPE, **options) -> ThreadWorker:
    return ThreadWorker(shape, shard_of(shape), tcp=True, tls=TLS, **options)


def make_dispatcher(shape: ToyShape = SHAPE) -> Dispatcher:
    return Dispatcher(
        engine_id="e", secret=shape.secret, hidden_size=shape.hidden, top_k=shape.top_k, dtype=shape.dtype,
        max_tokens=shape.max_tokens, expert_timeout_s=20.0,
    )  # fmt: skip


def tcp_socket(worker: ThreadWorker) -> socket.socket:
    return socket.create_connection((worker.server.endpoint.tcp_host, worker.server.endpoint.tcp_port), 5)


def test_answers_come_through_whole_in_both_directions():
    worker, dispatcher = make_worker(BIG), make_dispatcher(BIG)
    assert worker.replica("r").endpoint.tls
    dispatcher.update(BIG.table(1, [shard_of(BIG)], [worker.replica("r")]))
    x_TD, weights_TK = torch.full((1024, 2048), 2.0), torch.ones(1024, 2)
    tickets = [dispatcher.start(0, x_TD, weights_TK, torch.full((1024, 2), i, dtype=torch.int64)) for i in range(3)]
    for i, ticket in enumerate(tickets):
        out_TD = torch.empty_like(x_TD)
        dispatcher.finish(ticket, out_TD)
        assert torch.equal(out_TD, torch.full_like(x_TD, (i + 1) / 2))
    (link,) = dispatcher._links.all()
    assert link.kind == "tcp" and link.sock.version() == "TLSv1.3" and dispatcher.stats()["lost_links"] == 0
    dispatcher.check_integrity()
    dispatcher.close()
    worker.close()


def test_nothing_readable_crosses_the_wire():
    """A tap that forwards and records: the secret's proofs and the tokens are not in what it saw."""
    worker, dispatcher = make_worker(), make_dispatcher()
    seen = bytearray()
    tap = Tap(worker, seen)
    dispatcher.update(SHAPE.table(1, [shard_of(SHAPE)], [tap.replica]))
    x_TD, out_TD = torch.full((4, 8), 3.0), torch.empty(4, 8)
    dispatcher.finish(dispatcher.start(0, x_TD, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int64)), out_TD)
    assert len(seen) > 500 and not any(word in seen for word in (b"SWY", x_TD.numpy().tobytes()[:16], b"toy"))
    dispatcher.close()
    tap.close()
    worker.close()


class Tap:
    """Forwards TCP connections to a worker byte by byte; with `tls`, as a man in the middle with that certificate."""

    def __init__(self, worker: ThreadWorker, seen: bytearray, tls: ServerTls | None = None) -> None:
        self._worker, self._seen, self._tls = worker, seen, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        endpoint = Endpoint("elsewhere", "", "127.0.0.1", self._listener.getsockname()[1], True)
        self.replica = Replica("tapped", 0, endpoint, *vars_of(worker))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        far = tcp_socket(self._worker)
        if self._tls is not None:
            near = self._tls.wrap(near)
            near.do_handshake()
            far, _ = connect_tls(far, 5.0)
        with near, far:
            back = threading.Thread(target=self._forward, args=(far, near), daemon=True)
            back.start()
            self._forward(near, far)
            back.join()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._seen.extend(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """After either end has closed."""
        self._thread.join()
        self._listener.close()


def vars_of(worker: ThreadWorker):
    replica = worker.replica("r")
    return replica.state, replica.pid, replica.node


def agree(replica: Replica, secret: bytes = SHAPE.secret):
    agreement = Agreement(SHAPE.hidden, SHAPE.top_k, SHAPE.dtype, SHAPE.max_tokens, 2)
    return connect(replica, shard_of(SHAPE), agreement, "e", SHAPE.fingerprint, secret, 5.0)


def test_a_man_in_the_middle_is_found_out_by_the_first_proof():
    worker = make_worker()
    tap = Tap(worker, bytearray(), ServerTls.made())
    with pytest.raises(ConnectionLost):
        agree(tap.replica)
    assert eventually(lambda: worker.server.stats()["rejected"] == {"wrong_secret": 1})
    tap.close()
    worker.close()


def test_neither_side_goes_on_without_tls_where_it_is_asked_for():
    worker, plain = make_worker(), ThreadWorker(SHAPE, shard_of(SHAPE), tcp=True)
    endpoint = plain.server.endpoint
    stripped = Endpoint("elsewhere", "", endpoint.tcp_host, endpoint.tcp_port, True)
    with pytest.raises(TlsFailed):
        agree(Replica("r", 0, stripped, *vars_of(plain)))
    with tcp_socket(worker) as sock:
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)  # not even the challenge
        sock.sendall(b"SWYP\x01\x01\x00\x00" + bytes(64))
        sock.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # an alert, then the end
            while sock.recv(100):
                pass
    assert eventually(lambda: worker.server.stats()["rejected"] == {"tls_failed": 1})
    for each in (worker, plain):
        each.close()


def test_the_secret_is_asked_for_under_tls_too():
    worker = make_worker()
    with pytest.raises(ConnectionLost):
        agree(worker.replica("r"), b"some other secret of bytes")
    agree(worker.replica("r")).close()
    assert eventually(lambda: worker.server.stats()["rejected"] == {"wrong_secret": 1})
    worker.close()


def test_random_and_mutated_handshakes_hurt_nobody():
    worker, dispatcher = make_worker(handshake_timeout_s=0.3), make_dispatcher()
    dispatcher.update(SHAPE.table(1, [shard_of(SHAPE)], [worker.replica("r")]))
    hello = client_hello()
    rng = random.Random(0)
    for _ in range(150):
        noise = bytearray(hello)
        for _ in range(rng.randrange(1, 4)):
            noise[rng.randrange(len(noise))] = rng.randrange(256)
        with tcp_socket(worker) as sock:
            sock.sendall(rng.choice([bytes(noise), rng.randbytes(rng.randrange(1, 600)), hello[: rng.randrange(90)]]))
    out_TD = torch.empty(2, 8)
    ids_TK = torch.zeros(2, 2, dtype=torch.int64)
    dispatcher.finish(dispatcher.start(0, torch.ones(2, 8), torch.ones(2, 2), ids_TK), out_TD)
    assert torch.equal(out_TD, torch.full((2, 8), 0.25)) and dispatcher.stats()["lost_links"] == 0
    assert eventually(lambda: worker.server.stats()["strangers"] == 0)
    assert worker.server.stats()["rejected"].keys() <= {"tls_failed", "handshake_timeout"}
    dispatcher.close()
    worker.close()


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def test_a_silent_stranger_is_closed_in_time_and_holds_up_nobody():
    worker = make_worker(handshake_timeout_s=0.2)
    with tcp_socket(worker) as sock:
        begin_s = time.monotonic()
        agree(worker.replica("r")).close()
        assert not sock.recv(1) and time.monotonic() - begin_s < 3
    assert worker.server.stats()["rejected"] == {"handshake_timeout": 1}
    worker.close()


def test_certificates_that_cannot_be_used_are_refused(tmp_path):
    certificate = make_certificate()
    key = certificate[certificate.index(b"-----BEGIN PRIVATE KEY") :]
    for bad in (b"", b"nonsense", key, certificate[: -len(key)], certificate[: -len(key)] + make_certificate()):
        (tmp_path / "pem").write_bytes(bad)
        with pytest.raises(ConfigError, match="certificate"):
            ServerTls.read(tmp_path / "pem")
    with pytest.raises(ConfigError, match="cannot read"):
        ServerTls.read(tmp_path / "missing")
    (tmp_path / "pem").write_bytes(certificate)
    assert ServerTls.read(tmp_path / "pem").binding == ServerTls(certificate).binding != ServerTls.made().binding


def test_what_the_setting_means(tmp_path):
    (tmp_path / "pem").write_bytes(make_certificate())
    assert server_tls("auto", "127.0.0.1") is None and server_tls("off", "192.0.2.1") is None
    assert server_tls("auto", "192.0.2.1") and server_tls("auto", "0.0.0.0")
    assert server_tls(str(tmp_path / "pem"), "127.0.0.1")


def test_a_proof_for_one_certificate_is_worth_nothing_with_another():
    server = auth.ServerHandshake(SHAPE.secret, auth.EXPERT_CALLS, binding=TLS.binding)
    nonce = bytes(32)
    for binding, is_good in ((TLS.binding, True), (b"", False), (ServerTls.made().binding, False)):
        mac = auth._mac(SHAPE.secret, b"client", auth.EXPERT_CALLS, server.challenge[8:], nonce, binding)
        try:
            server.answer(b"SWYP\1\1\0\0" + nonce + mac)
        except auth.WrongSecret:
            assert not is_good
        else:
            assert is_good

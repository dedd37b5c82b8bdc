"""From a replica's address to an authenticated Link, blocking: for threads that are not the engine's."""

from __future__ import annotations

import os
import socket
import time

from cluster import auth, wire
from cluster.errors import ConnectionLost, Refused
from cluster.routing import Replica, Shard, host_id
from cluster.shm import Arena, new_doorbell
from cluster.tls import connect_tls
from cluster.transport import Link, ShmLink, TcpLink


def connect(
    replica: Replica,
    shard: Shard,
    agreement: wire.Agreement,
    engine_id: str,
    fingerprint: str,
    secret: bytes,
    timeout_s: float,
) -> Link:
    """Connect, authenticate and agree with a worker, by shared memory if it is on this host. Blocks up to `timeout_s`.

    Raises HandshakeError (Refused says why), ConnectionLost or a Malformed class.
    """
    deadline_s = time.monotonic() + timeout_s
    binding = b""
    local = replica.endpoint.host_id == host_id()
    sock = _open_socket(replica, local, timeout_s)
    try:
        if not local and replica.endpoint.tls:
            sock, binding = connect_tls(sock, timeout_s)
        auth.client_handshake(sock, secret, auth.EXPERT_CALLS, deadline_s, binding)
        link: Link
        if local:
            link = _agree_shm(replica, sock, agreement, engine_id, fingerprint, deadline_s)
        else:
            hello = wire.Hello(engine_id, fingerprint, agreement, 0)
            auth.send_exactly(sock, hello.encode(), deadline_s)
            link = TcpLink(replica, sock, Arena.private(agreement))
        try:
            sock.setblocking(True)
            _check_welcome(_receive_welcome(sock, deadline_s), shard)
            sock.setblocking(False)
        except BaseException:
            link.close()
            raise
        return link
    except BaseException:
        sock.close()
        raise


def _open_socket(replica: Replica, local: bool, timeout_s: float) -> socket.socket:
    family = socket.AF_UNIX if local else socket.AF_INET6 if ":" in replica.endpoint.tcp_host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        if local:
            sock.connect("\0" + replica.endpoint.unix_name)
        else:
            sock.connect((replica.endpoint.tcp_host, replica.endpoint.tcp_port))
            tune_tcp(sock)
    except OSError as e:
        sock.close()
        raise ConnectionLost(f"{replica.replica_id}: {e}") from e
    return sock


def tune_tcp(sock: socket.socket) -> None:
    """Small frames leave at once; a peer that vanished without a word is noticed after some ten seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


def _agree_shm(
    replica: Replica,
    sock: socket.socket,
    agreement: wire.Agreement,
    engine_id: str,
    fingerprint: str,
    deadline_s: float,
) -> ShmLink:
    arena, memfd = Arena.create(agreement)
    bells = [new_doorbell(), new_doorbell()]
    try:
        hello = wire.Hello(engine_id, fingerprint, agreement, len(arena.buffer))
        auth.send_exactly(sock, hello.encode(), deadline_s, (memfd, *bells))
        return ShmLink(replica, sock, arena, *bells)
    except BaseException:
        for bell in bells:
            os.close(bell)
        arena.close()
        raise
    finally:
        os.close(memfd)


def _receive_welcome(sock: socket.socket, deadline_s: float) -> wire.Welcome:
    frame = auth.receive_exactly(sock, wire.HEADER_BYTES, deadline_s)
    if frame[5] == wire.REFUSED:
        text = auth.receive_exactly(sock, wire.refused_text_bytes(frame), deadline_s)
        raise Refused(wire.read_text(text))
    return wire.Welcome.decode(frame)


def _check_welcome(welcome: wire.Welcome, shard: Shard) -> None:
    held = (welcome.first_layer, welcome.end_layer, welcome.num_local_experts)
    wanted = (shard.first_layer, shard.end_layer, len(shard.experts))
    if not (held[0] <= wanted[0] and wanted[1] <= held[1] and held[2] == wanted[2]):
        raise Refused(f"the worker holds (first layer, end layer, experts) {held}, the routing table says {wanted}")

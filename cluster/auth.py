"""Mutual proof of the cluster's secret, before the first frame of any connection.

    server -> client  Challenge (40 bytes)  0 "SWYC"  4 version=1  5 reserved 3             8 server nonce 32
    client -> server  Proof     (72 bytes)  0 "SWYP"  4 version=1  5 purpose  6 reserved 2  8 client nonce 32  40 mac 32
    server -> client  Accept    (40 bytes)  0 "SWYA"  4 version=1  5 reserved 3             8 mac 32

    mac = HMAC-SHA256(secret, "switchyard " + role + version + purpose + server nonce + client nonce + binding), role
    "client" or "server": a proof made for one role or purpose is worth nothing in another, and the client proves itself
    first, so that a listening port answers strangers with nothing but a random number. The binding is empty without
    TLS, and else what cluster/tls.py says: a proof made for one certificate is worth nothing with another.

Purposes: 1 expert calls, 2 routing tables. The exchange proves who opened the connection; without TLS later bytes are
neither encrypted nor signed, and TCP connections belong on a network on which nobody can write into others'.
While the secret is being changed (cluster/rotation.py), a server takes the former and the next one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.errors import BadMagic, BadReserved, BadVersion, ConfigError, ConnectionLost, HandshakeTimeout, WrongSecret

VERSION = 1
EXPERT_CALLS, ROUTING_TABLES = 1, 2
MIN_SECRET_BYTES = 16
CHALLENGE_BYTES, PROOF_BYTES, ACCEPT_BYTES = 40, 72, 40

_NONCE_BYTES = 32

Secret = bytes | Callable[[], bytes]  # itself, or what reads the current one


def current(secret: Secret) -> bytes:
    """The secret to prove now. Raises ConfigError for one that is too short, OSError where it cannot be read."""
    return check_secret(secret if isinstance(secret, bytes) else secret())


def check_secret(secret: bytes) -> bytes:
    """The secret itself; raises ConfigError for one that is too short to be one."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the cluster's secret must have at least {MIN_SECRET_BYTES} bytes, not {len(secret)}")
    return bytes(secret)


def _mac(
    secret: bytes, role: bytes, purpose: int, server_nonce: bytes, client_nonce: bytes, binding: bytes = b""
) -> bytes:
    message = b"switchyard " + role + bytes((VERSION, purpose)) + server_nonce + client_nonce + binding
    return hmac.new(secret, message, hashlib.sha256).digest()


def _check_head(data: bytes, magic: bytes, reserved: bytes) -> None:
    if data[:4] != magic:
        raise BadMagic(f"handshake began with {data[:4]!r} instead of {magic!r}")
    if data[4] != VERSION:
        raise BadVersion(f"handshake version {data[4]}, this side speaks {VERSION}")
    if any(reserved):
        raise BadReserved("handshake")


class ServerHandshake:
    """The server's half, without a socket: send `challenge`, then feed PROOF_BYTES to `answer`.

    A proof with `secret` or with one of `others` is taken.
    """

    __slots__ = ("_binding", "_nonce", "_purpose", "_secrets", "challenge")

    def __init__(self, secret: bytes, purpose: int, others: Sequence[bytes] = (), binding: bytes = b"") -> None:
        self._secrets = (secret, *others)
        self._purpose = purpose
        self._binding = binding
        self._nonce = os.urandom(_NONCE_BYTES)
        self.challenge = b"SWYC" + bytes((VERSION, 0, 0, 0)) + self._nonce

    def answer(self, proof: bytes) -> bytes:
        """The Accept bytes. Raises WrongSecret for a wrong proof or purpose, or a Malformed class."""
        _check_head(proof, b"SWYP", proof[6:8])
        client_nonce, mac = proof[8:40], proof[40:72]
        terms = (self._purpose, self._nonce, client_nonce, self._binding)
        held = [hmac.compare_digest(mac, _mac(secret, b"client", *terms)) for secret in self._secrets]
        if proof[5] != self._purpose or not any(held):
            raise WrongSecret("the client does not hold the cluster's secret, or wants another service")
        own = _mac(self._secrets[held.index(True)], b"server", *terms)
        return b"SWYA" + bytes((VERSION, 0, 0, 0)) + own


def client_handshake(sock: socket.socket, secret: bytes, purpose: int, deadline_s: float, binding: bytes = b"") -> None:
    """Run the client's half on a connected socket, blocking until time.monotonic() reaches `deadline_s`.

    Raises HandshakeTimeout, ConnectionLost, WrongSecret (the server does not hold the secret) or a Malformed class.
    A server that does not like our proof just closes: that is ConnectionLost here.
    """
    challenge = receive_exactly(sock, CHALLENGE_BYTES, deadline_s)
    _check_head(challenge, b"SWYC", challenge[5:8])
    server_nonce, client_nonce = challenge[8:40], os.urandom(_NONCE_BYTES)
    mac = _mac(secret, b"client", purpose, server_nonce, client_nonce, binding)
    send_exactly(sock, b"SWYP" + bytes((VERSION, purpose, 0, 0)) + client_nonce + mac, deadline_s)
    accept = receive_exactly(sock, ACCEPT_BYTES, deadline_s)
    _check_head(accept, b"SWYA", accept[5:8])
    if not hmac.compare_digest(accept[8:40], _mac(secret, b"server", purpose, server_nonce, client_nonce, binding)):
        raise WrongSecret("the server does not hold the cluster's secret")


def receive_exactly(sock: socket.socket, size: int, deadline_s: float) -> bytes:
    """`size` bytes from a socket before time.monotonic() reaches `deadline_s`; HandshakeTimeout or ConnectionLost."""
    data = bytearray()
    while len(data) < size:
        try:
            sock.settimeout(_time_left(deadline_s))
            chunk = sock.recv(size - len(data))
        except TimeoutError as e:
            raise HandshakeTimeout("the peer did not answer in time") from e
        except OSError as e:
            raise ConnectionLost(f"handshake: {e}") from e
        if not chunk:
            raise ConnectionLost("the peer closed the connection during the handshake")
        data += chunk
    return bytes(data)


def send_exactly(sock: socket.socket, data: bytes, deadline_s: float, fds: tuple[int, ...] = ()) -> None:
    """Send all of `data`, with `fds` attached to its first byte; HandshakeTimeout or ConnectionLost."""
    try:
        sock.settimeout(_time_left(deadline_s))
        sent = socket.send_fds(sock, [data], list(fds)) if fds else 0
        if sent < len(data):
            sock.sendall(data[sent:])
    except TimeoutError as e:
        raise HandshakeTimeout("the peer did not take our bytes in time") from e
    except OSError as e:
        raise ConnectionLost(f"handshake: {e}") from e


def _time_left(deadline_s: float) -> float:
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket: ids of the process and of its user."""

    pid: int
    user: int


def peer(connection: socket.socket) -> Peer:
    """The process that has connected, or that listens (SO_PEERCRED, unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return Peer(pid, user)

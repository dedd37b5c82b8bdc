"""TLS 1.3 on the data plane's TCP connections, pinned by the cluster's secret instead of by certificate authorities.

The worker shows a certificate that it made when it started, or one that was configured. The engine does not ask who
signed it: the proof of the secret that follows (cluster/auth.py) covers the certificate's SHA-256 on both sides, the
channel binding "tls-server-end-point" of RFC 5929, so that whoever sits in between with a certificate of its own is
found out by the first proof. Unix sockets and shared memory stay within one host and as they are.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import ssl
from pathlib import Path
from typing import Any

from cluster.addresses import is_loopback
from cluster.errors import ConfigError, ConnectionLost, HandshakeTimeout, TlsFailed

_VALID_DAYS = 3650  # nobody looks at it: the certificate is pinned


class TlsSocket(ssl.SSLSocket):
    """An SSLSocket that is not ready the way a socket is not ready: BlockingIOError. Small reads leave nothing behind.

    Only data meets these: in TLS 1.3 the handshake happens once, by do_handshake().
    """

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        try:
            return super().recv_into(buffer, nbytes, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


class ServerTls:
    """A worker's certificate. `pem` holds it and its key. Raises ConfigError for one that cannot be used."""

    def __init__(self, pem: bytes) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.num_tickets = 0  # connections live for ever: there is nothing to resume
        self._context.sslsocket_class = TlsSocket
        _load(self._context, pem)
        self.binding = _fingerprint(_first_certificate(pem))

    @classmethod
    def made(cls) -> ServerTls:
        """With a certificate of its own that nobody else has."""
        return cls(make_certificate())

    @classmethod
    def read(cls, path: Path) -> ServerTls:
        """With the certificate and key in a PEM file. Raises ConfigError."""
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.") from None

    def wrap(self, sock: socket.socket) -> TlsSocket:
        """The server's end of an accepted connection, whose handshake is still to come. Takes `sock` over."""
        wrapped = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        assert isinstance(wrapped, TlsSocket)
        return wrapped


def server_tls(setting: str, host: str) -> ServerTls | None:
    """What the setting worker.tls (auto, off or the path of a PEM file) means for a port on `host`; None is no TLS."""
    if setting == "auto":
        return None if is_loopback(host) else ServerTls.made()
    return None if setting == "off" else ServerTls.read(Path(setting))


def connect_tls(sock: socket.socket, timeout_s: float) -> tuple[TlsSocket, bytes]:
    """The client's end, after the handshake, and the binding for the proof. Takes `sock` over; blocks.

    Raises TlsFailed, HandshakeTimeout or ConnectionLost.
    """
    sock.settimeout(timeout_s)
    try:
        wrapped = _client_context().wrap_socket(sock, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"TLS: {error}") from error
    try:
        wrapped.do_handshake()
        certificate = wrapped.getpeercert(binary_form=True)
        if not certificate:
            raise TlsFailed("the server showed no certificate")
        assert isinstance(wrapped, TlsSocket)
        return wrapped, _fingerprint(certificate)
    except BaseException as error:
        wrapped.close()
        if isinstance(error, TimeoutError):
            raise HandshakeTimeout("the peer did not finish the TLS handshake in time") from error
        if isinstance(error, OSError):
            raise tls_error(error) from error
        raise


def tls_error(error: OSError) -> ConnectionLost | TlsFailed:
    """What an error of a TLS handshake means."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) or not isinstance(error, ssl.SSLError):
        return ConnectionLost(f"TLS: {error}")
    return TlsFailed(f"TLS: {error.reason or error}")


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # see the top of the file: the secret vouches for the certificate
    context.sslsocket_class = TlsSocket
    return context


def _first_certificate(pem: bytes) -> bytes:
    """DER of the first certificate, which is the one that a server shows as its own."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    start = pem.index(begin)
    return ssl.PEM_cert_to_DER_cert(pem[start : pem.index(end, start) + len(end)].decode("ascii"))


def _fingerprint(certificate_der: bytes) -> bytes:
    return hashlib.sha256(certificate_der).digest()


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Python's ssl reads files only; this one has no name and is gone when it is closed."""
    fd = os.memfd_create("switchyard-certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        # A password that is asked for on the terminal would stop the worker.
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=b"")
    except (OSError, ValueError) as error:
        text = f"a certificate that cannot be used: {error}. It must be a PEM with the certificate and its key."
        raise ConfigError(text) from None
    finally:
        os.close(fd)


def make_certificate() -> bytes:
    """A new P-256 key and a certificate that it signs itself, as one PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "switchyard")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + private

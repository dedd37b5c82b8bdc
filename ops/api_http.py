"""HTTP for the ops API: bodies, cookies, answers and errors. What is asked and answered is ops/api_server.py's."""

import http.cookies
import json
import urllib.parse
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from ops.action_log import in_words

_MAX_BODY_BYTES = 64 << 10
_SOCKET_TIMEOUT_S = 60.0


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class RequestHandler(BaseHTTPRequestHandler):
    """Subclasses say who may ask and what is answered: check_access(), get() and post()."""

    timeout = _SOCKET_TIMEOUT_S
    server_version = "switchyard"
    sys_version = ""

    def check_access(self, path: str) -> None:
        """Raises Refused."""
        raise NotImplementedError

    def get(self, path: str, query: Mapping[str, str]) -> None:
        """Answer a GET. Raises Refused."""
        raise NotImplementedError

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Answer a POST with a JSON object. Raises Refused."""
        raise NotImplementedError

    def do_GET(self) -> None:
        self._answer(lambda url: self.get(url.path, dict(urllib.parse.parse_qsl(url.query))))

    def do_POST(self) -> None:
        self._answer(lambda url: self.post(url.path, self._body()))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; actions are, in the audit log."""

    # -- reading --------------------------------------------------------------------------------------------------

    def hostname(self) -> str | None:
        return urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname

    def cookie(self, name: str) -> str:
        """Empty when there is none, or nothing can be made of what there is."""
        try:
            found = http.cookies.SimpleCookie(self.headers.get("Cookie", "")).get(name)
        except http.cookies.CookieError:
            return ""
        return found.value if found is not None else ""

    def _body(self) -> dict[str, Any]:
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length") from None
        if not 0 <= size <= _MAX_BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {_MAX_BODY_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(size))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
        return body

    # -- answering ------------------------------------------------------------------------------------------------

    def _answer(self, route: Callable[[urllib.parse.SplitResult], None]) -> None:
        self._has_begun = False
        self._cookies: list[str] = []
        try:
            url = urllib.parse.urlsplit(self.path)
            self.check_access(url.path)
            route(url)
        except Refused as refused:
            self.send_json({"error": str(refused)}, refused.status)
        except ConnectionError:
            pass  # whoever asked has left
        # The top of a request: the server goes on.
        except Exception as error:
            if not self._has_begun:
                self.send_json({"error": in_words(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def set_cookie(self, name: str, value: str, lives_s: int) -> None:
        """With the answer that begins next. Scripts cannot read it, and pages of other sites cannot use it."""
        self._cookies.append(f"{name}={value}; Path=/; Max-Age={lives_s}; HttpOnly; SameSite=Strict")

    def begin(self, status: HTTPStatus, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        """Status and headers; the body follows, until the connection is closed."""
        self._has_begun = True
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for cookie in self._cookies:
            self.send_header("Set-Cookie", cookie)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def begin_once(self, status: HTTPStatus, content_type: str) -> None:
        """begin(), unless that was done."""
        if not self._has_begun:
            self.begin(status, content_type)

    def redirect(self, path: str) -> None:
        self.begin(HTTPStatus.SEE_OTHER, "text/plain", {"Location": path})

    def send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.begin(status, "application/json")
        self.line(value)

    def line(self, value: Any) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")

"""The ops API and the console: what `switchyard status`, `drain` and people ask of a running `switchyard serve`.

HTTP and JSON on a port of its own, this machine only unless told otherwise. A request needs the run file's token, or
the cookie of a browser that has signed in with a link.

    GET  /ops                                    the console (ops/console/static); nothing in its files is secret
    POST /api/session  {"code"}                  signs a browser in; needs no token
    POST /api/sign-out {}
    POST /api/links    {}                        {"url"}: a link that signs in once
    GET  /api/status                             Control.status()
    GET  /api/view                               what the console shows: Live's view, with "about" and "can"
    GET  /api/stream                             the same as server-sent events; after the first with what is new only
    GET  /api/heat?window_s=60                   Heat.over(): tokens per layer and expert
    GET  /api/events?after=UNIX_TIME             events newer than that; waits up to 20 s for the first
    GET  /api/integrity                          Control.check_integrity()
    POST /api/ACTION   {..}                      ops/api_actions.py. Lines of JSON: {"say": text} as it goes on, then
                                                 {"done": true} or {"error": text, "status": 400 or 500}; one at a time
    POST /api/chat     {..}                      ops/console/chat.py; the answer is passed on as it comes

Errors are {"error": text}. Every action is written to the audit log.
"""

import hmac
import json
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from ops import api_actions
from ops.action_log import ActionLog, Busy
from ops.api_actions import Control
from ops.api_http import Refused, RequestHandler
from ops.console import chat
from ops.console.assets import HEADERS, read_assets
from ops.console.live import Live, news_since
from ops.console.sessions import SESSION_LIVES_S, Sessions

_LONG_POLL_S = 20.0
_POLL_S = 0.5
_KEEP_ALIVE_S = 10.0
_FIRST_VIEW_S = 15.0
_STOP_WITHIN_S = 0.1
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class ApiServer:
    """Listens at construction; serves in a thread until close().

    `audit_log` is appended to. `about` is what never changes and the console shows: {"model", "http" (base URL of the
    OpenAI API), "licence", ..}, see ops/serve.py.
    """

    def __init__(
        self, control: Control, token: str, host: str, port: int, audit_log: Path, about: Mapping[str, Any]
    ) -> None:
        self.control = control
        self.token = token
        self.hosts = (*_LOOPBACK_NAMES, host)
        self.about = about
        self.sessions = Sessions()
        self.assets = read_assets()
        self.stopping = threading.Event()
        self.actions = ActionLog(audit_log, self._changed)
        api = self

        class Handler(_Handler):
            api_server = api

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            self.actions.close()
            raise ConfigError(f"the ops API cannot listen on {host} port {port}: {error.strerror}.") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.address = f"http://{host}:{self.port}"
        self.live = Live(control, self.actions.recent)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STOP_WITHIN_S,), name="ops-api", daemon=True
        )
        self._thread.start()

    def console_link(self) -> str:
        """A link to the console that signs in whoever opens it first, within ten minutes."""
        return f"{self.address}/ops#{self.sessions.new_code()}"

    def close(self) -> None:
        """Stop listening. Actions under way are not waited for."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.live.close()
        self.actions.close()

    def _changed(self) -> None:
        self.live.changed()


class _Handler(RequestHandler):
    api_server: ApiServer

    # -- who may ------------------------------------------------------------------------------------------------------

    def check_access(self, path: str) -> None:
        """A browser that was lured here has neither our name in Host and Origin nor the token or the cookie."""
        if self.hostname() not in self.api_server.hosts:
            raise Refused(HTTPStatus.FORBIDDEN, "this server does not go by that name")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host', '')}":
            raise Refused(HTTPStatus.FORBIDDEN, "pages of other servers may not ask this one")
        is_open = path in ("/", "/api/session") or path == "/ops" or path.startswith("/ops/")
        if not is_open and not self._has_token() and not self.api_server.sessions.is_valid(self._session()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")

    def _has_token(self) -> bool:
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.api_server.token}".encode())

    def _session(self) -> str:
        return self.cookie(self._cookie_name)

    @property
    def _cookie_name(self) -> str:
        # Cookies know no ports: two clusters on one machine each have theirs.
        return f"switchyard-{self.api_server.port}"

    # -- routes -------------------------------------------------------------------------------------------------------

    def get(self, path: str, query: Mapping[str, str]) -> None:
        api = self.api_server
        match path:
            case "/api/status":
                self.send_json(api.control.status())
            case "/api/view":
                self.send_json(self._introduced(api.live.wait(0, _FIRST_VIEW_S)))
            case "/api/stream":
                self._stream()
            case "/api/heat":
                self.send_json(api.live.heat(_number(query.get("window_s", "0"))))
            case "/api/integrity":
                self.send_json(api.control.check_integrity())
            case "/api/events":
                self.send_json(self._events(_number(query.get("after", "0"))))
            case "/":
                self.redirect("/ops")
            case _:
                self._asset(path)

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        api = self.api_server
        name = path.removeprefix("/api/")
        if name == "session":
            self._sign_in(str(body.get("code", "")))
        elif name == "sign-out":
            api.sessions.sign_out(self._session())
            self.set_cookie(self._cookie_name, "", 0)
            self.send_json({})
        elif name == "links":
            self.send_json({"url": api.console_link()})
        elif name == "chat":
            self._chat(body)
        elif name in api_actions.ACTIONS and path.startswith("/api/"):
            self._act(name, body)
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path}")

    def _asset(self, path: str) -> None:
        asset = None
        if path == "/ops" or path.startswith("/ops/"):
            asset = self.api_server.assets.get(path.removeprefix("/ops") or "/")
        if asset is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path}")
        self.begin(HTTPStatus.OK, asset.content_type, HEADERS)
        self.wfile.write(asset.data)

    def _sign_in(self, code: str) -> None:
        session = self.api_server.sessions.sign_in(code)
        if session is None:
            raise Refused(
                HTTPStatus.UNAUTHORIZED, "this link was used or is too old; `switchyard console` prints another"
            )
        self.set_cookie(self._cookie_name, session, int(SESSION_LIVES_S))
        self.send_json({})

    def _introduced(self, view: Mapping[str, Any]) -> dict[str, Any]:
        return {**view, "about": dict(self.api_server.about), "can": api_actions.to_json()}

    def _stream(self) -> None:
        api = self.api_server
        events_s = samples_s = float("-inf")
        number = 0
        with api.live.watching():
            self.begin(HTTPStatus.OK, "text/event-stream")
            while not api.stopping.is_set():
                view = api.live.wait(number, _KEEP_ALIVE_S)
                if not view or view["number"] == number:
                    self.wfile.write(b": still here\n\n")  # finds out whether anybody listens
                    continue
                news = news_since(view, events_s, samples_s)
                data = json.dumps(news if number else self._introduced(news))
                self.wfile.write(f"data: {data}\n\n".encode())
                number = view["number"]
                events_s = max([events_s, *(event["time_s"] for event in news["events"])])
                samples_s = max([samples_s, *(sample["time_s"] for sample in news["samples"])])

    def _events(self, after_s: float) -> list[dict[str, Any]]:
        end_s = time.monotonic() + _LONG_POLL_S
        while True:
            events = [event for event in self.api_server.control.status()["events"] if event["time_s"] > after_s]
            if events or time.monotonic() > end_s:
                return events
            time.sleep(_POLL_S)

    def _act(self, name: str, body: Mapping[str, Any]) -> None:
        api = self.api_server
        try:
            action = api_actions.checked(name, body)
        except ConfigError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

        def do(say: Callable[[str], None]) -> None:
            action.run(api.control, body, say)

        def say(text: str) -> None:
            self.begin_once(HTTPStatus.OK, "application/x-ndjson")
            self.line({"say": text})

        asked_by = "with the token" if self._has_token() else "in the console"
        try:
            outcome = api.actions.perform(name, body, asked_by, do, say)
        except Busy as busy:
            raise Refused(HTTPStatus.CONFLICT, str(busy)) from None
        self.begin_once(HTTPStatus.OK, "application/x-ndjson")
        self.line(outcome)

    def _chat(self, body: Mapping[str, Any]) -> None:
        about = self.api_server.about
        try:
            lines = chat.ask(about["http"], about["model"], body)
        except (TypeError, ValueError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        self.begin(HTTPStatus.OK, "text/event-stream")
        for line in lines:
            self.wfile.write(line)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{text!r} is not a number") from None

"""The console's server side: signing in, what is pushed, incidents, history, heat, test chat and the page's files."""

import hashlib
import http.client
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ops import api_actions
from ops.api_server import ApiServer
from ops.cli import main
from ops.console.assets import read_assets
from ops.console.heat import Heat
from ops.console.history import KEEP_S, History, quantile
from ops.console.incidents import incidents
from ops.console.sessions import CODE_LIVES_S, SESSION_LIVES_S, Sessions
from ops.runs import announced, this_process
from tests.simulated import ABOUT, SimulatedCluster

TOKEN = "0123456789abcdef"
ROOT = Path(__file__).parents[2]
STATIC = ROOT / "ops" / "console" / "static"


@pytest.fixture
def cluster() -> SimulatedCluster:
    return SimulatedCluster(2, 2, layers=3, experts=4)


@pytest.fixture
def openai() -> Iterator[HTTPServer]:
    """An OpenAI API that answers "hello" twice, or refuses a wrong key; `asked` has the questions."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, body))
            is_welcome = self.headers.get("Authorization") in (None, "Bearer right")
            self.send_response(200 if is_welcome else 401)
            self.end_headers()
            answer = b'data: {"choices": []}\n\n' * 2 if is_welcome else b'{"error": {"message": "wrong key"}}'
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def api(cluster: SimulatedCluster, openai: HTTPServer, tmp_path: Path) -> Iterator[ApiServer]:
    about = {**ABOUT, "http": f"http://127.0.0.1:{openai.server_port}"}
    server = ApiServer(cluster, TOKEN, "127.0.0.1", 0, tmp_path / "audit.log", about)
    yield server
    server.close()


def request(api: ApiServer, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(api.address.removeprefix("http://"), timeout=10)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    return connection.getresponse()


def sign_in(api: ApiServer) -> str:
    """A session's cookie."""
    response = request(api, "POST", "/api/session", {"code": api.console_link().split("#")[1]})
    assert response.status == 200
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    return cookie.split(";")[0]


def next_view(response: http.client.HTTPResponse) -> dict:
    for line in response:
        if line.startswith(b"data: "):
            return json.loads(line[6:])
    raise AssertionError("the stream has ended")


def test_a_link_signs_in_once_and_for_a_while():
    now_s = 0.0
    sessions = Sessions(lambda: now_s)
    code, late = sessions.new_code(), sessions.new_code()
    session = sessions.sign_in(code)
    assert session and sessions.is_valid(session) and not sessions.is_valid("") and not sessions.is_valid(code)
    assert sessions.sign_in(code) is None and sessions.sign_in("guess") is None
    now_s = CODE_LIVES_S
    assert sessions.sign_in(late) is None
    now_s = SESSION_LIVES_S
    assert not sessions.is_valid(session)
    many = [sessions.sign_in(sessions.new_code()) for _ in range(100)]
    assert sessions.is_valid(many[-1]) and not sessions.is_valid(many[0])


def test_a_browser_signs_in_acts_and_signs_out(api, cluster, tmp_path):
    cookie = sign_in(api)
    assert request(api, "GET", "/api/view", Cookie=cookie).status == 200
    assert request(api, "GET", "/api/view", Cookie=cookie + "x").status == 401
    assert request(api, "GET", "/api/view", Cookie="a b=;;\x7f").status == 401
    worker = next(iter(cluster.workers))
    lines = request(api, "POST", "/api/drain", {"worker": worker}, Cookie=cookie).read().splitlines()
    assert json.loads(lines[-1]) == {"done": True} and worker not in cluster.workers
    assert f'in the console: drain {{"worker": "{worker}"}}: done' in (tmp_path / "audit.log").read_text()
    assert request(api, "POST", "/api/sign-out", {}, Cookie=cookie).status == 200
    assert request(api, "GET", "/api/view", Cookie=cookie).status == 401


def test_pages_of_others_may_not_ask(api):
    cookie = sign_in(api)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert request(api, "POST", "/api/restart", {"workers": []}, Cookie=cookie, Origin=origin).status == 403
    assert request(api, "GET", "/api/view", Cookie=cookie, Origin=api.address).status == 200


def test_what_happens_is_pushed(api, cluster):
    stream = request(api, "GET", "/api/stream", Cookie=sign_in(api))
    first = next_view(stream)
    assert first["about"]["model"] == "grok-2" and first["can"]["drain"]["offered"] == {"worker": "Drain"}
    assert len(first["events"]) == 5 and "events" not in first["status"]
    victim = next(iter(cluster.workers))
    cluster.kill(victim)
    news = next_view(stream)
    while not news["events"]:
        news = next_view(stream)
    assert [event["kind"] for event in news["events"]] == ["worker_lost"] and "about" not in news
    assert news["incidents"][-1]["subject"] == victim and news["incidents"][-1]["end_s"] is None


def test_an_action_goes_on_without_whoever_asked(api, cluster):
    told, left = threading.Event(), threading.Event()

    def restart(workers: list[str], *, say) -> None:
        say("first word")
        assert left.wait(10)
        for _ in range(50):
            say("a word for nobody " * 1000)
        told.set()

    cluster.restart = restart
    response = request(api, "POST", "/api/restart", {"workers": []}, Authorization=f"Bearer {TOKEN}")
    response.readline()
    response.close()
    left.set()
    assert told.wait(10)
    while (record := api.actions.recent()[-1])["end_s"] is None:
        pass
    assert record["error"] == "" and record["words"][0] == "first word" and len(record["words"]) == 51


def test_trouble_is_shown_with_what_was_known_last(api, cluster):
    stream = request(api, "GET", "/api/stream", Cookie=sign_in(api))
    known = next_view(stream)["status"]["epoch"]
    status, cluster.status = cluster.status, lambda: 1 / 0
    view = next_view(stream)
    while not view["trouble"]:
        view = next_view(stream)
    assert "division" in view["trouble"] and view["status"]["epoch"] == known
    cluster.status = status
    while view["trouble"]:
        view = next_view(stream)


def test_the_chat_passes_questions_on(api, openai):
    cookie = sign_in(api)
    body = {"mode": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10**9, "temperature": 0.5}
    response = request(api, "POST", "/api/chat", body, Cookie=cookie)
    assert response.status == 200 and response.read().count(b"data: ") == 2
    path, question = openai.asked[-1]
    assert path == "/v1/chat/completions" and question["model"] == "grok-2" and question["max_tokens"] == 4096
    request(api, "POST", "/api/chat", {"mode": "completion", "prompt": "a", "key": "right"}, Cookie=cookie).read()
    assert openai.asked[-1][0] == "/v1/completions" and openai.asked[-1][1]["prompt"] == "a"
    refused = request(api, "POST", "/api/chat", {"prompt": "a", "key": "wrong"}, Cookie=cookie)
    assert refused.status == 500 and b"wrong key" in refused.read()
    assert request(api, "POST", "/api/chat", {"max_tokens": "many"}, Cookie=cookie).status == 400


def test_the_page_is_all_that_is_served(api):
    page = request(api, "GET", "/ops")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and page.headers["X-Robots-Tag"] == "noindex"
    assert request(api, "GET", "/").headers["Location"] == "/ops"
    for path in ("/ops/../__init__.py", "/ops/%2e%2e/sessions.py", "/ops//etc/passwd", "/ops/vendor", "/opsx", "/x"):
        assert request(api, "GET", path, Authorization=f"Bearer {TOKEN}").status == 404, path
    for path, asset in read_assets().items():
        assert request(api, "GET", f"/ops{path}").read() == asset.data


def test_the_page_asks_nobody_else_and_has_nothing_inline():
    for path in STATIC.glob("*.*"):
        text = path.read_text()
        assert not re.search(r"(?:https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", "")), path.name
    page = (STATIC / "index.html").read_text()
    assert "<style" not in page and " style=" not in page and not re.search(r"<script[^>]*>[^<]", page)


def test_the_libraries_are_those_recorded():
    recorded = json.loads((STATIC / "vendor" / "vendor.json").read_text())
    assert {path.name for path in (STATIC / "vendor").glob("*.mjs")} == set(recorded)
    for name, entry in recorded.items():
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == entry["sha256"], name
        assert (STATIC / "vendor" / entry["licence"].split("(")[1].rstrip(")")).is_file()


def test_commands_print_links_and_views(api, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = this_process(model="m", http="http://127.0.0.1:8000", ops=api.address, token=TOKEN, logs="/logs")
    with announced(mine):
        assert main(["console"]) == 0
        link = capsys.readouterr().out.strip()
        assert link.startswith(f"{api.address}/ops#") and api.sessions.sign_in(link.split("#")[1])
        assert main(["top", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["about"]["model"] == "grok-2"
        assert main(["top"]) == 0
        assert "workers 4 of 4 online" in capsys.readouterr().out


def test_top_is_live_on_a_terminal_and_leaves_it_as_it_was(api, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = this_process(model="m", http="http://127.0.0.1:8000", ops=api.address, token=TOKEN, logs="/logs")
    ours, theirs = pty.openpty()
    with announced(mine):
        top = subprocess.Popen([sys.executable, "-m", "ops.cli", "top"], stdin=theirs, stdout=theirs, cwd=ROOT)
        before = termios.tcgetattr(ours)
        shown = _read_until(ours, b"workers 4 of 4 online")
        cluster.kill(next(iter(cluster.workers)))
        shown += _read_until(ours, b"workers 3 of 4 online")
        os.write(ours, b"q")
        assert top.wait(10) == 0
    shown += os.read(ours, 10_000)
    assert b"\033[?1049h" in shown and shown.endswith(b"\033[?1049l\033[?25h")
    assert termios.tcgetattr(ours) == before
    os.close(ours)
    os.close(theirs)


def _read_until(terminal: int, wanted: bytes) -> bytes:
    shown = b""
    while wanted not in shown:
        shown += os.read(terminal, 10_000)
    return shown


def test_a_cluster_that_has_gone_is_said_plainly(api, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = this_process(model="m", http="http://127.0.0.1:8000", ops="http://127.0.0.1:9", token=TOKEN, logs="/logs")
    with announced(mine):
        assert main(["top"]) == main(["status"]) == 1
    assert "127.0.0.1:9 does not answer" in capsys.readouterr().err


def event(time_s: float, kind: str, subject: str, text: str = "") -> dict:
    return {"time_s": time_s, "kind": kind, "subject": subject, "text": text}


def test_what_failed_what_was_done_and_how_long_it_took():
    found = incidents(
        [
            event(1.0, "worker_lost", "experts-0-a", "shard 0: status -9"),
            event(1.1, "shard_missing", "shard 0"),
            event(2.0, "worker_lost", "experts-0-b", "no heartbeat for 5 s"),
            event(3.0, "worker_online", "experts-1-c", "shard 1, pid 3"),
            event(4.0, "worker_online", "spare-d", "shard 0, pid 4"),
            event(4.1, "shard_back", "shard 0", "served again"),
            event(5.0, "worker_draining", "experts-1-c", "shard 1"),
            event(5.5, "worker_left", "experts-1-c", "drained"),
            event(6.0, "engine_lost", "engine-1"),
            event(9.0, "engine_ready", "engine-2", "pid 5: ready"),
        ]
    )
    took = [each["end_s"] and each["end_s"] - each["begin_s"] for each in found]
    assert took == pytest.approx([3.0, 3.0, None, 0.5, 3.0]) and [each["severity"] for each in found][3] == "info"
    assert found[0]["why"] == "shard 0: status -9" and found[0]["done"] == "spare-d is online (shard 0, pid 4)"


def test_history_counts_rates_and_percentiles(cluster):
    history = History()
    begin_s = cluster._begin_s + 100
    for step in range(6):
        status = cluster.status()
        for engine in status["engines"]:
            tokens = 100.0 * (step * 2)
            engine["load"].update(generated_tokens=tokens, prompt_tokens=0.0, finished=0.0)
            engine["load"]["first_token_s"] = {"le_s": [0.1, 0.2], "counts": [0.0, tokens, tokens]}
        history.add(begin_s + 2 * step, status)
    last = history.samples[-1]
    assert last["generated_per_s"] == pytest.approx(400.0) and last["workers"] == 4
    assert last["first_token_p50_s"] == pytest.approx(0.15) and history.samples[0]["generated_per_s"] is None
    for engine in status["engines"]:
        engine["load"] = {}  # it has just started
    history.add(begin_s + 12, status)
    assert history.samples[-1]["running"] == 0 and history.samples[-1]["generated_per_s"] == 0.0
    history.add(begin_s + 12 + KEEP_S, status)
    assert len(history.samples) == 2


def test_quantiles_are_linear_within_a_bucket():
    assert quantile(0.5, [1.0, 2.0], [4.0, 8.0, 8.0]) == 1.0
    assert quantile(0.75, [1.0, 2.0], [4.0, 8.0, 8.0]) == 1.5
    assert quantile(0.99, [1.0, 2.0], [0.0, 0.0, 8.0]) == 2.0
    assert quantile(0.5, [1.0], [0.0, 0.0]) is None and quantile(0.5, [], []) is None


def test_heat_over_windows():
    heat = Heat()
    assert heat.over(60.0) == {"seconds": 0.0, "tokens": []}
    for second in range(0, 120, 2):
        heat.add(float(second), [[second, 0], [0, 2 * second]])
    assert heat.over(0.0) == {"seconds": 2.0, "tokens": [[2, 0], [0, 4]]}
    assert heat.over(60.0)["seconds"] == pytest.approx(60.0, abs=6.0)
    assert heat.over(900.0) == {"seconds": 118.0, "tokens": [[118, 0], [0, 236]]}
    heat.add(122.0, [[1, 0], [0, 1]])  # another router counts from zero
    assert heat.over(60.0) == {"seconds": 0.0, "tokens": [[0, 0], [0, 0]]}


def test_actions_are_a_table():
    for action in api_actions.ACTIONS.values():
        unlabelled = [name for name, field in action.fields.items() if not field.label]
        assert len(unlabelled) <= 1 and action.explain.endswith(".")
        assert set(action.offered) <= {"worker", "shard", "cluster"}
    assert json.dumps(api_actions.to_json())

"""The ops API over real HTTP with a control that remembers, and the commands that ask it."""

import http.client
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, SwitchyardError
from ops import doctor, runs
from ops.api_server import ApiServer
from ops.cli import main
from ops.diagnosis import Grade, check_leftovers, check_machine, check_packages
from ops.events import event_line
from ops.runs import Run, announced, find_run, living_runs, this_process
from ops.status import render

TOKEN = "0123456789abcdef"
ROOT = Path(__file__).parents[2]


def replica(name: str, state: str = "online", role: str = "primary") -> dict:
    return {
        "id": name,
        "pid": 42,
        "node": "n",
        "state": state,
        "role": role,
        "load": {"tokens_per_s": 12.34, "waiting": 0},
        "memory_bytes": 3 << 20,
        "device": "cpu",
        "node_name": "here",
        "age_s": 65.0,
    }


def make_status(**changes: object) -> dict:
    status = {
        "model": "demo",
        "epoch": 1763,
        "router": {"pid": 7, "node": "n"},
        "missing_shards": [],
        "shards": [
            {
                "id": 0, "layers": [0, 2], "num_experts": 4, "wanted": 2,
                "replicas": [replica("experts-0-aa"), replica("experts-0-bb", "draining")],
            },
            {"id": 1, "layers": [0, 2], "num_experts": 4, "wanted": 1, "replicas": [replica("experts-1-cc")]},
        ],
        "spares": [{"id": "spare-dd", "pid": 43, "node": "n", "state": "ready", "shard": None}],
        "engines": [
            {
                "id": "engine-ee", "pid": 44, "node": "n", "state": "ready", "load": {}, "age_s": 7300.0,
                "node_name": "here",
            }
        ],
        "events": [
            {"time_s": 1000.0 + i, "kind": "worker_online", "subject": f"w{i}", "text": f"shard {i}"} for i in range(8)
        ],
        "progress": {},
        "layout": None,
    }  # fmt: skip
    return {**status, **changes}


class FakeControl:
    """deployments.control.Control without a cluster."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.answer = make_status()
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.error: Exception | None = None

    def _act(self, call: tuple, say) -> None:
        self.calls.append(call)
        say("first word")
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        say("last word")

    def status(self) -> dict:
        return self.answer

    def nodes(self) -> list[dict]:
        return []

    def expert_load(self) -> list[list[int]]:
        return [[1, 2], [3, 4]]

    def drain(self, worker, *, replace, say) -> None:
        self._act(("drain", worker, replace), say)

    def scale(self, shard, replicas, *, say) -> None:
        self._act(("scale", shard, replicas), say)

    def restart(self, workers, *, say) -> None:
        self._act(("restart", *workers), say)

    def check_integrity(self) -> list[dict]:
        return [{"subject": "engine-ee", "ok": True, "text": ""}]


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def api(control: FakeControl, tmp_path: Path) -> Iterator[ApiServer]:
    about = {"model": "demo", "http": "http://127.0.0.1:9"}
    server = ApiServer(control, TOKEN, "127.0.0.1", 0, tmp_path / "audit.log", about)
    yield server
    server.close()


@pytest.fixture
def run(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run file of this process, in a folder of the test's."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = this_process(model="demo", http="http://127.0.0.1:8000", ops=api.address, token=TOKEN, logs="/logs")
    with announced(mine):
        yield mine


def ask(api: ApiServer, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(api.address.removeprefix("http://"), timeout=10)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Authorization": f"Bearer {TOKEN}", **headers})
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def test_every_route_wants_the_token_and_our_name(api, control):
    for method, path in (("GET", "/api/status"), ("GET", "/api/nothing"), ("POST", "/api/drain")):
        for token in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
            status, headers, body = ask(api, method, path, {"worker": "w"}, Authorization=token)
            assert status == 401 and b"token" in body and TOKEN.encode() not in body
            assert headers["Cache-Control"] == "no-store"
        assert ask(api, method, path, {"worker": "w"}, Host="evil.example:80")[0] == 403
    assert control.calls == []


def test_status_and_integrity_are_passed_on(api, control):
    status, headers, body = ask(api, "GET", "/api/status")
    assert (status, json.loads(body)) == (200, control.answer)
    assert headers["Content-Type"] == "application/json" and headers["X-Content-Type-Options"] == "nosniff"
    assert json.loads(ask(api, "GET", "/api/integrity")[2]) == control.check_integrity()
    assert ask(api, "GET", "/api/else")[0] == 404


def test_actions_tell_how_they_go_and_are_audited(api, control, tmp_path):
    status, _, body = ask(api, "POST", "/api/drain", {"worker": "experts-0-aa", "replace": True})
    assert status == 200
    assert [json.loads(line) for line in body.splitlines()] == [
        {"say": "first word"}, {"say": "last word"}, {"done": True},
    ]  # fmt: skip
    ask(api, "POST", "/api/scale", {"shard": 1, "replicas": 3})
    ask(api, "POST", "/api/restart", {"workers": ["a", "b"]})
    assert control.calls == [("drain", "experts-0-aa", True), ("scale", 1, 3), ("restart", "a", "b")]
    control.error = ConfigError("no such worker")
    last = json.loads(ask(api, "POST", "/api/drain", {"worker": "x"})[2].splitlines()[-1])
    assert last == {"error": "no such worker", "status": 400}
    control.error = ValueError("oh")
    last = json.loads(ask(api, "POST", "/api/drain", {"worker": "x"})[2].splitlines()[-1])
    assert last == {"error": "ValueError: oh", "status": 500}
    audit = (tmp_path / "audit.log").read_text().splitlines()
    assert len(audit) == 5
    assert audit[0].endswith('with the token: drain {"worker": "experts-0-aa", "replace": true}: done')
    assert audit[3].endswith("no such worker") and TOKEN not in "".join(audit)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/drain", {}),
        ("/api/drain", {"worker": 5}),
        ("/api/drain", {"worker": "a", "replace": "yes"}),
        ("/api/drain", {"worker": "a", "else": 1}),
        ("/api/scale", {"shard": "0", "replicas": 1}),
        ("/api/scale", {"shard": 0}),
        ("/api/restart", {"workers": "all"}),
        ("/api/restart", {"workers": [1]}),
        ("/api/restart", b"not json"),
        ("/api/restart", b"[]"),
    ],
)
def test_bodies_that_make_no_sense_are_refused(api, control, path, body):
    status, _, text = ask(api, "POST", path, body)
    assert status == 400 and "error" in json.loads(text)
    assert control.calls == []


def test_too_much_and_too_little_are_refused(api):
    assert ask(api, "POST", "/api/drain", b"x" * 100_000)[0] == 413
    assert ask(api, "POST", "/api/drain", b"", **{"Content-Length": "many"})[0] == 411
    assert ask(api, "GET", "/api/events?after=soon")[0] == 400


def test_one_action_at_a_time(api, control):
    control.gate = threading.Event()
    first = threading.Thread(target=ask, args=(api, "POST", "/api/scale", {"shard": 0, "replicas": 2}))
    first.start()
    assert control.entered.wait(10)
    status, _, body = ask(api, "POST", "/api/drain", {"worker": "w"})
    assert status == 409 and b"another action" in body
    assert ask(api, "GET", "/api/status")[0] == 200, "looking is always allowed"
    control.gate.set()
    first.join()
    control.gate = None
    assert ask(api, "POST", "/api/drain", {"worker": "w"})[0] == 200


def test_events_wait_for_news(api, control):
    assert [e["subject"] for e in json.loads(ask(api, "GET", "/api/events?after=1005.5")[2])] == ["w6", "w7"]
    answers: list[bytes] = []
    waiting = threading.Thread(target=lambda: answers.append(ask(api, "GET", "/api/events?after=1007")[2]))
    waiting.start()
    news = {"time_s": 2000.0, "kind": "worker_lost", "subject": "w9", "text": "gone"}
    control.answer = make_status(events=[*control.answer["events"], news])
    waiting.join(5)
    assert json.loads(answers[0]) == [news]


def test_run_files_are_private_and_the_dead_ones_go(run, tmp_path):
    folder = runs.run_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path = folder / f"{os.getpid()}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert living_runs() == [run] and find_run(None) == find_run(8000) == run
    with pytest.raises(ConfigError, match="no cluster listens on port 9"):
        find_run(9)
    fields = json.loads(path.read_text())
    (folder / "999999999.json").write_text(json.dumps({**fields, "pid": 999999999}))
    (folder / "1.json").write_text(json.dumps({**fields, "pid": 1}))  # another process now
    (folder / "2.json").write_text("{")
    assert living_runs() == [run] and [each.name for each in folder.iterdir()] == [path.name]
    (folder / "again.json").write_text(path.read_text().replace(":8000", ":9000"))
    with pytest.raises(ConfigError, match="several clusters"):
        find_run(None)
    assert find_run(9000).http.endswith(":9000")


def test_without_a_cluster_commands_say_how_to_start_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for command in (["status"], ["events"], ["drain", "w"], ["scale", "0", "--replicas", "2"], ["restart"]):
        assert main(command) == 2
        assert "Start one with `switchyard serve`" in capsys.readouterr().err


def test_status_for_people_and_for_programs(run, control, capsys):
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert "demo, epoch 1763" in text and "(1 of 2)" in text and "\033" not in text
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == control.answer
    control.answer = make_status(missing_shards=[1])
    assert main(["status"]) == 1
    assert "shard 1 HAS NO WORKER" in capsys.readouterr().out
    control.answer = make_status(engines=[])
    assert main(["status"]) == 1


def test_the_table_is_aligned():
    lines = render(make_status())
    head = next(line for line in lines if line.startswith("shard "))
    rows = [line for line in lines if "experts-" in line]
    assert len(rows) == 3
    for row in rows:
        assert row.index("experts-") == head.index("replica")
        assert row.index("here cpu") == head.index("on", head.index("age")), (row, head)
    assert "65 s" in rows[0] and "12.3" in rows[0] and "3 MiB" in rows[0]
    assert lines[-1].endswith("w7: shard 7") and sum("worker_online" in line for line in lines) == 5
    assert any("2 h" in line for line in lines)
    coloured = render(make_status(), colours=True)
    assert any("\033[32monline" in line for line in coloured)


def test_commands_act_and_tell(run, control, capsys):
    assert main(["drain", "experts-0-aa", "--replace"]) == 0
    out = capsys.readouterr().out
    assert "first word" in out and out.rstrip().endswith("drained experts-0-aa")
    assert main(["scale", "0", "--replicas", "3", "--port", "8000"]) == 0
    assert main(["restart", "a"]) == 0
    assert control.calls == [("drain", "experts-0-aa", True), ("scale", 0, 3), ("restart", "a")]
    control.error = ConfigError("is the last replica")
    assert main(["drain", "x"]) == 2
    control.error = SwitchyardError("it did not start")
    assert main(["drain", "x"]) == 1
    assert "it did not start" in capsys.readouterr().err


def test_a_cluster_elsewhere_needs_its_token(api, control, tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    assert main(["status", "--json", "--url", api.address, "--token-file", str(token)]) == 0
    token.write_text("wrong")
    assert main(["status", "--url", api.address, "--token-file", str(token)]) == 2
    assert main(["status", "--url", api.address]) == 2
    assert main(["status", "--url", "ftp://x", "--token-file", str(token)]) == 2
    assert main(["status", "--url", api.address, "--token-file", str(tmp_path / "none")]) == 2
    words = capsys.readouterr().err
    assert "--url needs --token-file" in words and "the token is missing or wrong" in words


def test_events_are_lines(run, control, capsys):
    assert main(["events", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == control.answer["events"]
    assert main(["events"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == event_line(control.answer["events"][0])


def test_commands_start_without_the_heavy_libraries():
    code = "import sys; from ops import status, drain, scale, restart, events, doctor; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "'ops.api_client'" in loaded
    for heavy in ("torch", "ray", "vllm", "numpy", "starlette"):
        assert f"'{heavy}'" not in loaded, heavy


def grades(findings) -> list[Grade]:
    return [finding.grade for finding in findings]


def test_the_doctor_judges_a_cluster(run, control):
    def get(path: str):
        return control.status() if path == "/api/status" else integrity

    integrity = control.check_integrity()
    assert grades(doctor.cluster_findings(run, get)) == [Grade.WARN, Grade.OK], "a shard has 1 of 2 replicas"
    control.answer = make_status(missing_shards=[0], engines=[])
    assert grades(doctor.cluster_findings(run, get))[:1] == [Grade.FAIL]
    assert grades(doctor.cluster_findings(run, get)).count(Grade.FAIL) == 2
    control.answer = make_status()
    integrity = [{"subject": "experts-0-aa", "ok": False, "text": "a slot is lost"}]
    found = list(doctor.cluster_findings(run, get))
    assert found[-1].grade is Grade.FAIL and "a slot is lost" in found[-1].text

    def broken(path: str):
        raise SwitchyardError("does not answer")

    assert grades(doctor.cluster_findings(run, broken)) == [Grade.FAIL]


def test_the_doctor_looks_at_the_machine(run, capsys, tmp_path):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["grade"] for each in found} <= {"ok", "warn"}
    assert {"ray", "Python", "memory", "clock"} <= {each["subject"] for each in found}
    assert grades(check_machine(memory_bytes=1 << 30, disk_bytes=1 << 20))[1:] == [Grade.WARN, Grade.WARN]
    assert set(grades(check_packages())) == {Grade.OK}
    (tmp_path / "psm_00000000").touch()
    (tmp_path / "other").touch()
    (finding,) = check_leftovers(tmp_path)
    assert finding.grade is Grade.WARN and "psm_00000000" in finding.advice and "other" not in finding.text

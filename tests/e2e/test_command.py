"""The `switchyard` command as people use it: what it says, how it ends, what it leaves behind."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import LicenceNotAccepted
from cluster.tls import make_certificate
from deployments.app import build_app
from ops.cli import main
from ops.ports import check_port, free_ports
from tests.golden import GOLDENS

pytestmark = pytest.mark.timeout(600)

COMMAND = [str(Path(sys.executable).with_name("switchyard"))]
MODEL = GOLDENS / "mixtral-tiny"


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=180, cwd=cwd or "/", check=False
    )


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything: for commands that end before anything is started."""
    stdout, stderr = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as end:  # argparse's
            status = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def test_version_and_help():
    assert re.fullmatch(r"switchyard \d+\.\d+\.\d+ \(ray .*torch .*Python .*\)\n", run("version").stdout)
    assert "serve" in run("--help").stdout
    assert "--workers" in run("serve", "--help").stdout
    assert run().returncode == 2


@contextlib.contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/folder"], "is not a folder"),
        (["--model", "/tmp"], "has no config.json"),
        (["--model", MODEL, "--workers", "9"], "Use at most 8"),
        (["--model", MODEL, "--workers", "many"], "invalid int value"),
        (["--model", MODEL, "--dtype", "int3"], "invalid choice"),
        (["--model", MODEL, "--replicas", "5000"], "not enough memory"),
        (["--model", MODEL, "--port", "99999"], "from 1 to 65535"),
    ],
)
def test_mistakes_are_explained_in_a_paragraph(arguments, words):
    done = run_here("serve", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_grok2_is_refused_until_its_licence_is_accepted(tmp_path):
    shutil.copytree(GOLDENS / "grok2-tiny/unsharded", tmp_path / "grok-2")
    (tmp_path / "grok-2/LICENSE").write_text("Grok 2 Community License Agreement\n")
    refused = run("serve", "--model", tmp_path / "grok-2")
    assert refused.returncode == 2
    assert "Grok 2 Community License" in refused.stderr and "--accept-license" in refused.stderr
    assert "starting Ray" not in refused.stdout
    with pytest.raises(LicenceNotAccepted):
        build_app({"model": str(tmp_path / "grok-2")})  # what `serve run` calls
    # Accepted, it is the next check that stops it.
    accepted = run_here("serve", "--model", tmp_path / "grok-2", "--accept-license", "--workers", "9")
    assert accepted.returncode == 2 and "Use at most 8" in accepted.stderr


def test_a_busy_port_is_named():
    with listening() as port:
        done = run("serve", "--model", MODEL, "--port", port)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr and "--port" in done.stderr


def test_a_wrong_key_in_the_config_file_is_answered_with_the_nearest(tmp_path):
    config = tmp_path / "ray-config.yaml"
    config.write_text(
        "applications:\n- import_path: deployments.app:build_app\n  args: {model: demo, worker: 2, replica: 1}\n"
    )
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 2
    assert "worker: must be a mapping" in done.stderr or "The nearest is replicas" in done.stderr


def test_a_checkpoint_that_vllm_cannot_load_ends_with_its_reason(tmp_path):
    """Found only once the engine starts: still one paragraph, and everything is stopped."""
    config = json.loads((MODEL / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    config["model_type"] = "no-such-model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    done = run("serve", "--model", tmp_path, "--port", free_ports(1)[0])
    assert done.returncode == 1
    assert "did not start" in done.stderr and "logs are in" in done.stderr
    assert "Traceback" not in done.stderr


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def shared_memory_of(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            found |= set(re.findall(r"(/dev/shm/\S+)", Path(f"/proc/{process.pid}/maps").read_text()))
    return {name for name in found if Path(name).exists()}


@pytest.mark.parametrize(("number", "is_secured"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_serve_says_what_it_does_answers_and_leaves_nothing_behind(tmp_path, number, is_secured):
    (port,) = free_ports(1)
    guard = Guard(tmp_path, port) if is_secured else None
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(*COMMAND, "serve", "--model", str(MODEL), "--dtype", "float32", "--port", str(port)),
                *(guard.options if guard else ()),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        )
    try:
        wait_for("ready:", log, process)
        if guard:
            guard.check()
        else:
            ask(port)
        children = descendants(process.pid)
        shared_memory = shared_memory_of(children)
        folders = set(Path("/tmp").glob("switchyard-*/owner"))
        mine = {owner.parent for owner in folders if owner.read_text() == str(process.pid)}
        assert len(children) > 5 and mine
        started_s = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 0, log.read_text()
        assert time.monotonic() - started_s < 30
    finally:
        process.kill()
    text = log.read_text()
    assert "workers: 2 of 2 ready" in text and "/v1/completions -H" in text and "stopped; logs are kept in" in text
    assert "Traceback" not in text
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not [folder for folder in mine if folder.exists()]
    assert not [name for name in shared_memory if Path(name).exists()]
    check_port("127.0.0.1", port)
    kept = Path(re.search(r"logs are kept in (\S+)", text)[1])
    assert list(kept.glob("serve/replica_*")), "the logs are gone"
    if guard:
        said = b"".join(path.read_bytes() for path in kept.rglob("*") if path.is_file()) + text.encode()
        assert not [key for key in guard.keys if key[16:].encode() in said], "a key is in the logs"


class Guard:
    """API keys and HTTPS of one server: made before it starts, checked while it runs."""

    def __init__(self, folder: Path, port: int) -> None:
        self._file, self._pem, self._port = folder / "keys.json", folder / "http.pem", port
        self._pem.write_bytes(make_certificate())
        self.keys = [self._make("alice"), self._make("bob", "--requests-per-minute", "2")]
        self.options = ["--api-keys", str(self._file), "--tls-cert", str(self._pem), "--tls-key", str(self._pem)]

    def _make(self, *words: str) -> str:
        return str(json.loads(run("keys", "add", *words, "--file", self._file, "--json").stdout)["key"])

    def _status(self, key: str | None, path: str = "/v1/models", body: bytes | None = None) -> tuple[int, Any, Any]:
        context = ssl.create_default_context(cafile=str(self._pem))
        context.check_hostname = False  # the certificate names no address
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, context=context, timeout=60)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        with contextlib.closing(connection):
            connection.request("POST" if body else "GET", path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read() or b"null")

    def check(self) -> None:
        alice, bob = self.keys
        body = json.dumps({"model": MODEL.name, "prompt": [1, 2, 3], "max_tokens": 4}).encode()
        assert self._status(alice, "/v1/completions", body)[2]["usage"]["completion_tokens"] == 4
        assert self._status(None, "/health")[0] == 200
        strangers = [
            self._status(key, path, body)[::2]
            for key in (None, "x", alice[:-1])
            for path in ("/v1/x", "/v1/completions")
        ]
        assert strangers[0][0] == 401 and strangers[0][1]["error"]["code"] == 401
        assert all(each == strangers[0] for each in strangers)
        answers = [self._status(bob) for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        assert 0 < int(answers[-1][1]["Retry-After"]) <= 30 and answers[-1][2]["error"]["code"] == 429
        rotated = run("rotate-secret", "--port", self._port)
        assert rotated.returncode == 0 and "worthless everywhere" in rotated.stdout, rotated.stderr
        assert self._status(alice, "/v1/completions", body)[0] == 200
        assert run("keys", "revoke", "alice", "--file", self._file).returncode == 0
        deadline_s = time.monotonic() + 5
        while self._status(alice)[0] != 401:
            assert time.monotonic() < deadline_s, "a revoked key still gets in"
            time.sleep(0.1)


def wait_for(words: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)


def ask(port: int) -> None:
    body = {"model": MODEL.name, "prompt": [1, 2, 3], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 4

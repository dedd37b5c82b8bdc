"""`switchyard up`, `join` and `down`: what is checked before anything starts, in words that say what to do."""

import contextlib
import dataclasses
import os
import socket
import stat
import subprocess
import sys

import pytest

from cluster.addresses import is_loopback
from cluster.errors import ConfigError
from deployments.machine import node_name
from ops.beacon import Beacon, check_fit, own_beacon
from ops.cli import main
from ops.join import check_reachable, parse_head, ray_command
from ops.node_environment import check_token, make_token
from ops.runs import joined_here, joined_nodes

HEAD = Beacon("0.1.0", "2.60.0", "3.11.9", 1000.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "3.12.1"}, "python is 3.12.1 here and 3.11.9 on the head. .*install the same Python"),
        ({"ray": "2.61.0"}, "ray is 2.61.0 here and 2.60.0 on the head"),
        ({"switchyard": "0.2.0"}, "same release"),
        ({"time_s": 1060.0}, "clock is 60 s ahead of the head's. Set both with NTP"),
        ({"time_s": 940.0}, "clock is 60 s behind"),
    ],
)
def test_machines_that_do_not_fit_are_told_why(change, words):
    check_fit(HEAD, dataclasses.replace(HEAD, time_s=1003.0))
    with pytest.raises(ConfigError, match=words):
        check_fit(HEAD, dataclasses.replace(HEAD, **change))


def test_the_beacon_comes_through_and_nothing_else_does():
    assert Beacon.from_json(own_beacon().to_json()).python == own_beacon().python
    for data in (None, b"", b"{}", b"[]", b'{"ray": 1}', b"\xff"):
        with pytest.raises(ConfigError, match="not one of `switchyard up`"):
            Beacon.from_json(data)


def test_the_token_is_private_made_once_and_checked(tmp_path):
    path = tmp_path / "deep" / "token"
    with pytest.raises(ConfigError, match=r"`switchyard up` makes it on the head; copy it here"):
        check_token(path)
    make_token(path)
    token = path.read_text()
    make_token(path)
    assert path.read_text() == token and len(token) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    check_token(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_token(path)
    for bad in (b"", b"short", b"\xff" * 64, b"a" * 31 + b"\n" + b"b" * 40):
        path.chmod(0o600)
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match="holds no token"):
            check_token(path)


def test_addresses(tmp_path):
    assert parse_head("10.0.0.1") == ("10.0.0.1", 6379)
    assert parse_head("head.example:7000") == ("head.example", 7000)
    assert parse_head("fd00::1") == parse_head("[fd00::1]") == ("fd00::1", 6379)
    assert parse_head("[fd00::1]:7000") == ("fd00::1", 7000)
    for bad in ("", ":6379", "head:", "head:x", "head:0", "head:70000", "head:\u0661"):
        with pytest.raises(ConfigError, match="not an address such as"):
            parse_head(bad)
    assert [is_loopback(each) for each in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "10.0.0.1", "head")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    command = ray_command("10.0.0.1:6379", "10.0.0.2", tmp_path, 0)
    assert "--address=10.0.0.1:6379" in command and "--node-ip-address=10.0.0.2" in command
    assert f"--labels=switchyard-node={node_name()}" in command
    assert "--num-gpus=0" in command and "--num-gpus" not in " ".join(ray_command("h:1", "a", tmp_path, None))


def test_a_head_that_does_not_run_is_told_from_a_firewall():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound, and does not listen: connections are refused
        with pytest.raises(ConfigError, match=r"refuses connections.*Does `switchyard up` run there"):
            check_reachable("127.0.0.1", sock.getsockname()[1])
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # the queue is full: further connections get no answer, as behind a firewall
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(ConfigError, match=r"does not answer on port \d+ within 0.2 s. A firewall"):
            check_reachable("127.0.0.1", full.getsockname()[1], 0.2)
    with pytest.raises(ConfigError, match="cannot reach"):
        check_reachable("no-such-host.invalid", 1)


def test_mistakes_end_with_status_2_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["join", "10.0.0.1"]) == 2
    assert main(["up", "--address", "127.0.0.1"]) == 2
    assert main(["down"]) == 2
    words = capsys.readouterr().err
    assert "copy it here" in words and "`switchyard serve` is for one machine" in words and "nothing to stop" in words


def test_down_takes_a_joined_machine_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    script = (
        "import sys\nfrom ops.runs import joined_here\n"
        "with joined_here('10.0.0.1:6379'):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    with process:
        assert process.stdout.readline() == b"in\n"
        assert [(node.pid, node.head) for node in joined_nodes()] == [(process.pid, "10.0.0.1:6379")]
        assert main(["down"]) == 0
    assert joined_nodes() == [] and "this machine's part in 10.0.0.1:6379" in capsys.readouterr().out
    with joined_here("h:1"):
        assert len(joined_nodes()) == 1
    assert joined_nodes() == []

"""How both sides are started: the same settings, nothing of ours in the rival's environment."""

import argparse
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cluster.config import parse_settings
from cluster.errors import ConfigError
from ops.bench import compare, sides
from ops.bench.servers import Server, ServerFailed
from ops.ports import free_ports


def test_benchmark_settings_are_valid_and_without_prefix_caching():
    settings = parse_settings(sides.bench_args("m", num_workers=1, dtype="bfloat16", streams=100, tokens=96))
    assert settings.workers == 1
    assert settings.engine.max_num_seqs == 100
    assert settings.engine.vllm == {"enable_prefix_caching": False}
    assert Path(settings.model).is_absolute()


def test_the_written_config_is_read_back_as_the_same_settings(tmp_path):
    from ops.serve_config import read_serve_config

    settings = parse_settings(sides.bench_args("m", num_workers=2, dtype="float32", streams=8, tokens=96))
    sides.write_config(tmp_path / "ray-config.yaml", settings)
    assert parse_settings(read_serve_config(tmp_path / "ray-config.yaml").args) == settings


def test_overrides_reach_nested_settings_and_leave_the_original_alone():
    args = {"model": "m", "engine": {"vllm": {"a": 1}}}
    changed = sides.override(args, ["engine.threads=2", "engine.vllm.seed=3", "expert_timeout_s=1.5"])
    assert changed == {"model": "m", "expert_timeout_s": 1.5, "engine": {"threads": 2, "vllm": {"a": 1, "seed": 3}}}
    assert args == {"model": "m", "engine": {"vllm": {"a": 1}}}


@pytest.mark.parametrize("word", ["engine.threads", "=2", "model.x=1"])
def test_a_malformed_override_is_refused(word):
    with pytest.raises(ValueError, match="--set"):
        sides.override({"model": "m"}, [word])


def test_environment_words():
    assert sides.environment_assignments(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        sides.environment_assignments(["A"])


def test_vllm_command_line():
    switches = {"enforce_eager": False, "disable_log_stats": False, "log": True}
    arguments = {"max_model_len": 512, **switches, "names": ["a", "b"], "over": {"k": 1}}
    assert sides.command_line(arguments) == [
        *("--max-model-len", "512", "--no-enforce-eager", "--log"),
        *("--names", "a", "b", "--over", '{"k": 1}'),
    ]


def test_the_rival_inherits_nothing_of_ours():
    inherited = {"PATH": "/bin", "SWITCHYARD_FEED": "x", "SWITCHYARD_ENGINE_ID": "e"}
    assert sides.plain_environment(inherited) == {"PATH": "/bin"}
    assert sides.switchyard_environment(inherited)["SWITCHYARD_FEED"] == "x"


def test_the_rival_gets_every_core_and_openmps_own_spinning(monkeypatch):
    monkeypatch.setattr("deployments.cores.allowed_cores", lambda: (0, 1, 2))
    settings = parse_settings(sides.bench_args("m", num_workers=1, dtype="bfloat16", streams=8, tokens=96))
    environment = sides.colocated_environment(settings, {"PATH": "/bin", "SWITCHYARD_FEED": "x"})
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,2"
    assert environment["PATH"] == "/bin"
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "SWITCHYARD_FEED"} & set(environment)


def test_both_sides_are_loaded_only_where_they_fit():
    assert compare.fits_twice(checkpoint_bytes=1 << 30, available_bytes=16 << 30)
    assert not compare.fits_twice(checkpoint_bytes=8 << 30, available_bytes=24 << 30)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(["--model", "m", *words])


def test_quick_is_shorter_and_explicit_options_win():
    usual, quick = compare.make_plan(parse(), 100), compare.make_plan(parse("--quick", "--rounds", "3"), 100)
    assert (usual.rounds, usual.workload.output_tokens, usual.streams) == (3, 64, (1, 8, 32))
    assert (quick.rounds, quick.workload.output_tokens) == (3, 32)


@pytest.mark.parametrize("words", [("--rounds", "-1"), ("--output-tokens", "1"), ("--requests-per-stream", "0")])
def test_a_plan_that_measures_nothing_is_refused(words):
    with pytest.raises(ConfigError, match=words[0]):
        compare.make_plan(parse(*words), 100)


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        compare.run(parse("--model", str(tmp_path)))


def start(tmp_path: Path, program: str) -> Server:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return Server("side", command, {}, "http://127.0.0.1:9", "m", tmp_path / "side.log")


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(tmp_path):
    server = start(tmp_path, "print('no such model'); raise SystemExit(3)")
    with server, pytest.raises(ServerFailed, match="ended with status 3") as caught:
        server.wait_ready(30.0, lambda elapsed_s: None)
    assert "no such model" in str(caught.value)


def test_ready_means_that_the_server_itself_answers(tmp_path):
    """A stranger who got the port first does not count, nor does another model."""
    program = """
        import http.server, sys
        class Models(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": [{"id": "m"}]}')
        http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", textwrap.dedent(program), str(port)]
    with Server("owner", command, {}, url, "m", tmp_path / "owner.log") as owner:
        owner.wait_ready(30.0, lambda elapsed_s: None)
        owner.model = "n"
        with pytest.raises(ServerFailed, match="not ready after 1 s"):
            owner.wait_ready(1.0, lambda elapsed_s: None)
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        other = Server("other", sleeper, {}, url, "m", tmp_path / "other.log")
        with other, pytest.raises(ServerFailed, match="not ready after 1 s"):
            other.wait_ready(1.0, lambda elapsed_s: None)


def test_stopping_takes_what_the_server_started_with_it(tmp_path):
    """The server ends in order but forgets a child."""
    program = """
        import signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("up", flush=True)
        time.sleep(600)
    """
    with start(tmp_path, program) as server:
        while "up" not in server.log.read_text():
            server.check_alive()
        assert server.cpu_s() > 0
        child = server._members()[1]
    assert not child.is_running() or child.status() == "zombie"
    assert len(server.killed) == 1


def test_a_frozen_server_uses_no_cpu_and_can_still_be_stopped(tmp_path):
    with start(tmp_path, "while True: pass") as server:
        server.freeze()
        before_s = server.cpu_s()
        time.sleep(0.3)
        assert server.cpu_s() - before_s < 0.05
        server.thaw()
        while server.cpu_s() - before_s < 0.1:
            server.check_alive()
        server.freeze()
    assert server.killed == []

"""`switchyard convert`: what it prints, what it refuses, and that it goes on after it was killed."""

import fcntl
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from model.grok_checkpoint import Progress, convert_ckpt0
from ops.cli import main
from ops.convert import ProgressLines, progress_line, read_config
from tests import ckpt0, golden

ROOT = Path(__file__).resolve().parents[2]
CKPT = golden.GOLDENS / "grok1-m2/int8/ckpt-0"
MANIFEST = golden.GOLDENS / "grok1-m2/manifest.json"


def progress(done_bytes: int, found_bytes: int = 0, num_files_done: int = 1) -> Progress:
    return Progress(10**10, done_bytes, found_bytes, 4, num_files_done, "some tensor")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_around_ckpt0_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(CKPT.parent), str(tmp_path / "out"), "--config", str(MANIFEST), "--experts", "int8"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    assert "7 of 7 files, 0.00 of 0.00 GB" in shown.err.splitlines()[-1]
    assert shown.err.splitlines()[-1].endswith("model-experts-layer-00002.safetensors")
    convert_ckpt0(CKPT, tmp_path / "expected", config=golden.config("grok1-m2"), experts="int8")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_config_beside_the_files_is_used(tmp_path: Path) -> None:
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1))
    (source / "config.json").write_text(json.dumps(ckpt0.CONFIG))
    assert main(["convert", str(source), str(tmp_path / "out"), "--exact", "--workers", "2"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (8, 3, 1)
    assert config["attn_output_multiplier"] == 0.35


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1)), str(tmp_path / "out")
    broken = tmp_path / "broken.json"
    broken.write_text("[1]")
    for arguments, words in (
        ([str(source), target], "no heads of 128"),
        ([str(tmp_path), target, "--config", str(tmp_path / "none.json")], "none.json is no JSON file"),
        ([str(source), target, "--config", str(broken)], "broken.json is not a JSON object"),
        ([str(source), target, "--workers", "0"], "--workers: is 0"),
        ([str(tmp_path / "nowhere"), target], "give the folder ckpt-0"),
    ):
        assert main(["convert", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not Path(target).exists()


def test_config_files(tmp_path: Path) -> None:
    assert read_config(tmp_path, None) is None
    assert read_config(tmp_path, MANIFEST) == golden.config("grok1-m2")
    (tmp_path / "config.json").write_text('{"key_size": 8}')
    assert read_config(tmp_path, None) == {"key_size": 8}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is no JSON file"):
        read_config(tmp_path, None)


@pytest.mark.parametrize(
    ("now", "elapsed_s", "text"),
    [
        (progress(2 * 10**9), 60.0, "1 of 4 files, 2.00 of 10.00 GB, 1 min 00 s, 4 min 00 s left: some tensor"),
        (progress(2 * 10**9, found_bytes=10**9), 600.0, "10 min 00 s, 1 h 20 min left"),
        (progress(10**9, found_bytes=10**9), 3.0, "0 min 03 s, time left unknown"),
        (progress(10**10, num_files_done=4), 100.0, "4 of 4 files, 10.00 of 10.00 GB, 1 min 40 s, 0 min 00 s left"),
        (progress(10**10, 10**10, 4), 0.0, "0 min 00 s left"),
    ],
)
def test_the_time_left(now: Progress, elapsed_s: float, text: str) -> None:
    assert text in progress_line(now, elapsed_s)


def test_lines_are_not_too_many_and_skipped_files_take_no_time() -> None:
    clock = iter([0.0, 100.0, 101.0, 103.0, 105.0, 106.0])
    out = io.StringIO()
    lines = ProgressLines(out, 5.0, lambda: next(clock))
    lines(progress(10**9, found_bytes=10**9))  # verifying what was found took 100 s
    lines(progress(2 * 10**9, found_bytes=10**9))
    lines(progress(3 * 10**9, found_bytes=10**9))
    lines(progress(5 * 10**9, found_bytes=10**9))
    lines(progress(10**10, found_bytes=10**9, num_files_done=4))
    shown = out.getvalue().splitlines()
    assert len(shown) == 3
    assert "0 min 05 s, 0 min 06 s left" in shown[1]
    assert "4 of 4 files" in shown[2]


def test_the_same_command_after_a_kill(tmp_path: Path) -> None:
    arguments = ["convert", str(CKPT), str(tmp_path / "out"), "--config", str(MANIFEST), "--progress-s", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE, bufsize=0
    )
    with process:
        assert process.stderr is not None
        # A full pipe holds the process: it cannot come to its end before it is killed.
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        first = process.stderr.read(1500)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert b"0 of 7 files" in first
    assert not (tmp_path / "out/config.json").exists()
    assert main(arguments) == 0
    convert_ckpt0(CKPT, tmp_path / "expected", config=golden.config("grok1-m2"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")

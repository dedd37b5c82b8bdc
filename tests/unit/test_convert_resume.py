"""A conversion that is killed at any point and started again gives the same bytes."""

import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError, ConfigError
from model.conversion_journal import JOURNAL, RECORD
from model.grok_checkpoint import Progress, convert_ckpt0
from tests import ckpt0, golden
from tests.conversion_child import child, convert_in_steps

pytestmark = pytest.mark.timeout(120)

CKPT = golden.GOLDENS / "grok1-m2/int8/ckpt-0"
NUM_KILLS = 10


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """What a file that is written again cannot have again: its inode and time together."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def start_child():
    """Processes forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conversion_child"])

    def start(source: Path, target: Path, options: dict[str, Any]):
        connection, other = context.Pipe()
        process = context.Process(target=child, args=(source, target, options, other))
        process.start()
        other.close()
        return process, connection

    return start


def kill_after(start_child, source: Path, target: Path, options: dict[str, Any], num_steps: int) -> None:
    """SIGKILL while the child stands at its num_steps-th step."""
    process, connection = start_child(source, target, options)
    for number in range(num_steps):
        assert connection.recv_bytes() == b"step"
        if number < num_steps - 1:
            connection.send_bytes(b"go on")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def count_steps(source: Path, target: Path, options: dict[str, Any]) -> int:
    steps = 0
    lock = threading.Lock()

    def step() -> None:
        nonlocal steps
        with lock:
            steps += 1

    convert_in_steps(source, target, options, step)
    return steps


@pytest.mark.parametrize("experts", ["bf16", "int8"])
def test_killed_at_ten_random_points(start_child, tmp_path: Path, experts: str) -> None:
    options = {"config": golden.config("grok1-m2"), "experts": experts}
    num_steps = count_steps(CKPT, tmp_path / "whole", options)
    expected = contents(tmp_path / "whole")
    assert JOURNAL not in expected
    for number, steps in enumerate(random.Random(experts).sample(range(1, num_steps + 1), NUM_KILLS)):
        target = tmp_path / f"killed-{number}"
        kill_after(start_child, CKPT, target, options, steps)
        before = inodes(target)
        convert_ckpt0(CKPT, target, **options)
        assert contents(target) == expected, f"killed after step {steps} of {num_steps}"
        after = inodes(target)
        again = [name for name in before if after[name] != before[name]]
        assert len(again) <= 1, "at most the file that was not in the journal yet is written again"


def test_killed_again_and_again(start_child, tmp_path: Path) -> None:
    """It gets on a little each time: what is finished is not done again."""
    options = {"config": golden.config("grok1-m2")}
    convert_ckpt0(CKPT, tmp_path / "whole", **options)
    for _ in range(4):
        kill_after(start_child, CKPT, tmp_path / "killed", options, 60)
    found: list[Progress] = []
    convert_ckpt0(CKPT, tmp_path / "killed", progress=found.append, **options)
    assert found[-1].found_bytes > 0
    assert found[-1].done_bytes == found[-1].total_bytes
    assert found[-1].num_files_done == found[-1].num_files == 7
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_several_workers_write_the_same_bytes(tmp_path: Path) -> None:
    config = golden.config("grok1-m2")
    convert_ckpt0(CKPT, tmp_path / "one", config=config)
    convert_ckpt0(CKPT, tmp_path / "four", config=config, workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_a_damaged_result_is_written_again(tmp_path: Path) -> None:
    source, target = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(2)), tmp_path / "out"
    convert_ckpt0(source, target, config=ckpt0.CONFIG)
    expected, before = contents(target), inodes(target)
    damaged = target / "model-experts-layer-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (target / "model-dense-outer.safetensors").unlink()
    convert_ckpt0(source, target, config=ckpt0.CONFIG)
    assert contents(target) == expected
    changed = {name for name, inode in inodes(target).items() if before[name] != inode}
    assert changed == {damaged.name, "model-dense-outer.safetensors"}


def test_a_source_that_changed_is_named(tmp_path: Path) -> None:
    """Between two runs two layers were swapped: nothing in the files tells, the record does."""
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(2))
    convert_ckpt0(source, tmp_path / "out", config=ckpt0.CONFIG)
    first, second = source / ckpt0.file_name(4), source / ckpt0.file_name(16)
    first_data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_data)
    with pytest.raises(CheckpointError, match="tensor00004_000 is not the file that was converted before"):
        convert_ckpt0(source, tmp_path / "out", config=ckpt0.CONFIG)


def test_a_new_time_alone_changes_nothing(tmp_path: Path) -> None:
    source, target = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1)), tmp_path / "out"
    convert_ckpt0(source, target, config=ckpt0.CONFIG)
    before = inodes(target)
    for path in source.iterdir():
        os.utime(path)
    convert_ckpt0(source, target, config=ckpt0.CONFIG)
    assert inodes(target) == before


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    source, target = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1)), tmp_path / "out"
    convert_ckpt0(source, target, config=ckpt0.CONFIG)
    with pytest.raises(ConfigError, match="other options"):
        convert_ckpt0(source, target, config=ckpt0.CONFIG, experts="int8")
    with pytest.raises(ConfigError, match="is not empty"):
        convert_ckpt0(source, source, config=ckpt0.CONFIG)
    (target / RECORD).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        convert_ckpt0(source, target, config=ckpt0.CONFIG)


def test_only_one_conversion_writes_at_a_time(start_child, tmp_path: Path) -> None:
    source, target = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1)), tmp_path / "out"
    process, connection = start_child(source, target, {"config": ckpt0.CONFIG})
    assert connection.recv_bytes() == b"step"
    with pytest.raises(ConfigError, match="Another conversion"):
        convert_ckpt0(source, target, config=ckpt0.CONFIG)
    process.kill()
    process.join()
    convert_ckpt0(source, target, config=ckpt0.CONFIG)


def test_an_error_stops_the_other_workers_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    files = ckpt0.random_files(4)
    files[9].data = b"\xff" * len(files[9].data)  # not finite
    source, target = ckpt0.write(tmp_path / "ckpt-0", files), tmp_path / "out"
    with pytest.raises(CheckpointError, match="tensor00009_000"):
        convert_ckpt0(source, target, config=ckpt0.CONFIG, workers=3)
    assert not list(target.glob("*.partial"))
    assert not (target / "config.json").exists()
    good = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(4))
    convert_ckpt0(good, target, config=ckpt0.CONFIG)
    convert_ckpt0(good, tmp_path / "other", config=ckpt0.CONFIG)
    assert contents(target) == contents(tmp_path / "other")

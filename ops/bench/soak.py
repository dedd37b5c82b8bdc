"""`switchyard bench soak`: random faults under load for a long time, and what has leaked after it.

One row of the fault suite after the other (ops/bench/faults.py), faults drawn from a seed; after each one the
processes, descriptors, memory and shared memory of the whole cluster are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import ConfigError, SwitchyardError
from cluster.sabotage import Fault
from ops.bench.fault_row import Row, table
from ops.bench.faults import (
    add_cluster_arguments,
    cluster_settings,
    expected_tokens,
    question_for,
    run_row,
    say,
    served,
)

# An engine's death is allowed to cost requests, and takes a minute: the soak is about what nobody may notice.
FAULTS = tuple(fault for fault in Fault if fault is not Fault.ENGINE_LOSS)
_SHARED_MEMORY = Path("/dev/shm")
# Caches fill and connections come and go; a leak grows with every fault, so it is well past this after a dozen.
_MORE_DESCRIPTORS = 1.10
_MORE_MEMORY = 1.15


@dataclass(frozen=True)
class Footprint:
    """What a process and all its descendants take. memory_bytes is their private memory (USS)."""

    num_processes: int
    num_descriptors: int
    memory_bytes: int
    num_shared_files: int


def footprint(pid: int) -> Footprint:
    """Of the process tree under `pid`, as far as it lives through being looked at."""
    root = psutil.Process(pid)
    counted: list[tuple[int, int]] = []
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                counted.append((process.num_fds(), process.memory_full_info().uss))
    return Footprint(
        num_processes=len(counted),
        num_descriptors=sum(descriptors for descriptors, _ in counted),
        memory_bytes=sum(memory for _, memory in counted),
        num_shared_files=sum(1 for _ in _SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else 0,
    )


def leaks(before: Footprint, after: Footprint) -> list[str]:
    """In words, what `after` has too much of; empty when nothing has leaked."""
    found = []
    if after.num_processes > before.num_processes:
        found.append(f"processes: {before.num_processes} before, {after.num_processes} after")
    if after.num_shared_files > before.num_shared_files:
        found.append(f"files in {_SHARED_MEMORY}: {before.num_shared_files} before, {after.num_shared_files} after")
    if after.num_descriptors > before.num_descriptors * _MORE_DESCRIPTORS:
        found.append(f"descriptors: {before.num_descriptors} before, {after.num_descriptors} after")
    if after.memory_bytes > before.memory_bytes * _MORE_MEMORY:
        found.append(f"memory: {before.memory_bytes >> 20} MiB before, {after.memory_bytes >> 20} MiB after")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench soak`."""
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="how long (%(default)s)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="load (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (%(default)s)")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit status of `switchyard bench soak`: 0 when all was as promised and nothing leaked, else 1."""
    if arguments.minutes <= 0 or arguments.streams < 1:
        raise ConfigError("--minutes must be more than 0 and --streams 1 or more.")
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="switchyard-soak-"))
    logs.mkdir(parents=True, exist_ok=True)
    settings = cluster_settings(arguments, logs, arguments.streams)
    draw = random.Random(arguments.seed)
    rows: list[Row] = []
    counts: list[Footprint] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with served(settings, logs, say) as cluster:
            question = question_for(settings, cluster)
            expected = expected_tokens(question)
            end_s = time.monotonic() + arguments.minutes * 60
            while time.monotonic() < end_s:
                fault = draw.choice(FAULTS)
                rows.append(run_row(cluster, question, expected, fault, arguments.streams, most_strikes=1))
                counts.append(footprint(cluster.server.pid))
                left_s = max(0.0, end_s - time.monotonic())
                say(f"{fault.value}: {'as promised' if rows[-1].is_as_promised else rows[-1]}; {left_s:.0f} s to go")
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except SwitchyardError as error:
        say(f"switchyard bench: {error}")
        return 1
    finally:
        if rows:
            _print(rows, counts, arguments.json)
    return 0 if all(row.is_as_promised for row in rows) and not leaks(counts[0], counts[-1]) else 1


def _print(rows: Sequence[Row], counts: Sequence[Footprint], as_json: bool) -> None:
    found = leaks(counts[0], counts[-1]) if counts else []
    if as_json:
        document = {
            "rows": [row.to_json() for row in rows],
            "footprints": [asdict(each) for each in counts],
            "leaks": found,
        }
        print(json.dumps(document, indent=2), flush=True)
        return
    print(table(rows))
    for name, each in zip(("first", "last"), (counts[0], counts[-1]), strict=True):
        print(
            f"{name}: {each.num_processes} processes, {each.num_descriptors} descriptors, "
            f"{each.memory_bytes >> 20} MiB, {each.num_shared_files} files in {_SHARED_MEMORY}"
        )
    print("leaked: " + ("; ".join(found) or "nothing"), flush=True)

"""``switchyard convert``: Grok-1 as released, or any model with integer experts, into a folder that can be served."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from deployments.conversion import Progress

DESCRIPTION = """\
Convert Grok-1 as released (the folder ckpt-0 of xai-org/grok-1) into safetensors that Switchyard serves, or the experts
of a Hugging Face folder (Grok-2 as published, Mixtral, Qwen-MoE, ..) into integers.

  switchyard convert grok-1/ckpt-0 grok-1-int8 --experts int8    the released numbers, half of bf16's size
  switchyard convert grok-2 grok-2-int4 --experts int4           a quarter

The files are read as data: nothing in them is ever run. A conversion that was interrupted goes on when the same command
is given again; one that is complete is verified. If SRC, or the folder it is in, has SHA256SUMS or the metadata of a
download from Hugging Face, every file is checked against it.
"""

CONFIG_FILE = "config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard convert`."""
    parser.add_argument("source", type=Path, metavar="SRC", help="ckpt-0 or its parent, or a model folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder for the converted model")
    parser.add_argument(
        "--experts",
        choices=("bf16", "int8", "int4"),
        default="bf16",
        help="bf16: dequantised, each weight rounded to bfloat16 as in xAI's code. "
        "int8: of ckpt-0 the released numbers and scales as they are; else a scale for every 128 inputs. "
        "int4: 4 bits, and a scale for every 128 inputs (%(default)s)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="do not round dequantised weights: float32, for int8 experts when they are loaded",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with fields of xAI's run.py (emb_size, key_size, num_layers, ..) of a model of another shape "
        f"than the released one (SRC/{CONFIG_FILE}, if it is there)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="files written at once (%(default)s)")
    parser.add_argument(
        "--progress-s", type=float, default=5.0, metavar="S", help="least seconds between two lines (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit status of `switchyard convert`."""
    if arguments.workers < 1:
        raise ConfigError(f"--workers: is {arguments.workers}, must be 1 or more.")
    from deployments.conversion import convert_ckpt0, convert_hub, is_hub_folder

    common = {
        "experts": arguments.experts,
        "workers": arguments.workers,
        "progress": ProgressLines(sys.stderr, arguments.progress_s, time.monotonic),
    }
    if is_hub_folder(arguments.source):
        _check_hub(arguments)
        convert_hub(arguments.source, arguments.destination, **common)
    else:
        config = read_config(arguments.source, arguments.config)
        convert_ckpt0(arguments.source, arguments.destination, exact=arguments.exact, config=config, **common)
    print(arguments.destination)
    return 0


def _check_hub(arguments: argparse.Namespace) -> None:
    if arguments.experts == "bf16":
        raise ConfigError(
            f"{arguments.source} is served as it lies; to convert its experts give --experts int8 or int4."
        )
    if arguments.exact or arguments.config is not None:
        raise ConfigError("--exact and --config are for Grok-1's ckpt-0; a model folder needs neither.")


def read_config(source: Path, given: Path | None) -> dict[str, Any] | None:
    """The fields of run.py: from the given file, or from config.json in `source` if there is one; else None.

    They may be the file's top level or its "config". Raises ConfigError when there is no JSON object.
    """
    path = given or source / CONFIG_FILE
    if given is None and not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {path} is no JSON file: {error}") from None
    fields = content.get("config", content) if isinstance(content, dict) else None
    if not isinstance(fields, dict):
        raise ConfigError(f"--config: {path} is not a JSON object.")
    return fields


class ProgressLines:
    """Called with each Progress; prints a line when `interval_s` has passed since the last one, and at the end."""

    def __init__(self, out: TextIO, interval_s: float, clock_s: Callable[[], float]):
        self._out = out
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._start_s = clock_s()
        self._printed_s: float | None = None

    def __call__(self, progress: "Progress") -> None:
        now_s = self._clock_s()
        if progress.done_bytes == progress.found_bytes:
            self._start_s = now_s  # what was found done took no writing: it says nothing about the time left
        is_last = progress.num_files_done == progress.num_files
        if self._printed_s is None or is_last or now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            print(progress_line(progress, now_s - self._start_s), file=self._out, flush=True)


def progress_line(progress: "Progress", elapsed_s: float) -> str:
    """One line; the time left is what the bytes still missing take at the rate so far."""
    written_bytes = progress.done_bytes - progress.found_bytes
    missing_bytes = progress.total_bytes - progress.done_bytes
    left_s = missing_bytes * elapsed_s / written_bytes if written_bytes else None
    left = "time left unknown" if left_s is None and missing_bytes else f"{_duration(left_s or 0.0)} left"
    return (
        f"  {progress.num_files_done} of {progress.num_files} files, "
        f"{progress.done_bytes / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB, "
        f"{_duration(elapsed_s)}, {left}: {progress.last}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"

"""A conversion in a process that tells each of its steps and waits before going on, so that it can be killed there."""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model.grok_checkpoint import convert_ckpt0


def convert_in_steps(source: Path, target: Path, options: dict[str, Any], step: Callable[[], None]) -> None:
    """Convert, calling step() after every tensor, and before and after everything that makes a file final."""
    rename, sync, unlink = Path.rename, os.fsync, Path.unlink

    def between(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            step()
            result = call(*args, **kwargs)
            step()
            return result

        return stepped

    try:
        Path.rename, os.fsync, Path.unlink = between(rename), between(sync), between(unlink)  # type: ignore[method-assign]
        convert_ckpt0(source, target, progress=lambda _: step(), **options)
    finally:
        Path.rename, os.fsync, Path.unlink = rename, sync, unlink  # type: ignore[method-assign]


def child(source: Path, target: Path, options: dict[str, Any], connection: Connection) -> None:
    """Run in a process of its own: one message per step, one answer waited for."""

    def step() -> None:
        connection.send_bytes(b"step")
        connection.recv_bytes()

    convert_in_steps(source, target, options, step)
    connection.send_bytes(b"done")

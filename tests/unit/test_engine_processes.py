"""Which processes an engine's replica takes for its engine's."""

import os
import subprocess
import sys

import pytest

from deployments import vllm_app
from model.nursery_client import NurseryFailed


def test_a_nursery_that_is_stuck_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def forks_of(name: str, pid: int) -> list[int]:
        if name == "stuck":
            raise NurseryFailed("it is another cluster's, and stopped")
        return [fork.pid] if pid == os.getpid() else []

    waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        subprocess.Popen(waits, stdin=subprocess.PIPE) as child,
        subprocess.Popen(waits, stdin=subprocess.PIPE) as fork,
    ):
        monkeypatch.setattr(vllm_app, "_nurseries", lambda: ["stuck", "ours"])
        monkeypatch.setattr(vllm_app, "forks_of", forks_of)
        found = {process.pid for process in vllm_app.engine_processes()}
        assert {child.pid, fork.pid} <= found

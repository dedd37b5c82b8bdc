"""The servers under measurement as processes: start, wait until ready, freeze and thaw, CPU used, stop completely."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from cluster.errors import ConfigError, SwitchyardError
from ops.runs import Run, find_run

POLL_S = 0.5
LOG_TAIL_LINES = 30
HTTP_TIMEOUT_S = 5.0
# An orderly stop of Ray and vLLM takes seconds on two busy cores; after that they are killed.
STOP_TIMEOUT_S = 60.0
LEFTOVER_PATIENCE_S = 3.0
_ANNOUNCED_S = 30.0


class ServerFailed(SwitchyardError):
    """A server under measurement did not start, or died; the message has the last lines of its log."""


class Server:
    """One server process and its descendants, in a session of their own so that Ctrl-C reaches them through us only."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        base_url: str,
        model: str,
        log: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
    ):
        self.name = name
        self._stop_signal = stop_signal
        self.base_url = base_url
        self.model = model
        self.log = log
        self.killed: list[str] = []
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float, waiting: Callable[[float], None]) -> float:
        """Wait until it serves its model; returns the seconds that took. Calls `waiting` about every 10 s."""
        started_s = time.monotonic()
        next_word_s = 10.0
        while not self._serves():
            self.check_alive()
            elapsed_s = time.monotonic() - started_s
            if elapsed_s > timeout_s:
                raise ServerFailed(f"{self.name} was not ready after {timeout_s:.0f} s.\n{self.log_tail()}")
            if elapsed_s > next_word_s:
                waiting(elapsed_s)
                next_word_s += 10.0
            time.sleep(POLL_S)
        return time.monotonic() - started_s

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/v1/models", timeout=HTTP_TIMEOUT_S) as response:
                models = [model["id"] for model in json.load(response)["data"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.model in models and self._listens()

    def _listens(self) -> bool:
        """Whether it is one of its own processes that answers, and not a stranger who got the port first."""
        port = urllib.parse.urlsplit(self.base_url).port
        return any(port in _listening_ports(process) for process in self._members())

    def check_alive(self) -> None:
        """Raises ServerFailed when the process has ended."""
        status = self._process.poll()
        if status is not None:
            raise ServerFailed(f"{self.name} ended with status {status}.\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of the log, under its path."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {self.log}:", *("  " + line for line in lines)])

    def cpu_s(self) -> float:
        """CPU seconds that the server's living processes have used, and their dead children."""
        return sum(_cpu_s(process) for process in self._members())

    def _members(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def freeze(self) -> None:
        """Stop all its processes in their tracks, so that the other side has the machine to itself."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def stop(self) -> None:
        """Ask it to stop, then kill what is left; `killed` gets the names of those. Idempotent."""
        self.thaw()
        members = self._members()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            members = self._members() or members
        left = _wait_gone(members)
        self.killed += filter(None, [_kill(process) for process in left])
        _wait_gone(left)
        self._process.wait()


def _listening_ports(process: psutil.Process) -> set[int]:
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.Error:
        return set()
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _wait_gone(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that are still alive after a moment's patience."""
    deadline_s = time.monotonic() + LEFTOVER_PATIENCE_S
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline_s:
        time.sleep(POLL_S / 10)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    """Zombies do not count: whoever adopted them may collect them late."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> str:
    """psutil compares start times, so a process that took over the number is not hit."""
    try:
        name = process.name()
        process.kill()
    except psutil.Error:
        return ""
    return f"{name} ({process.pid})"


def total_cpu_s() -> float:
    """CPU seconds that this machine has spent on anything since it started, steal time included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def run_of(server: Server) -> Run:
    """What a `switchyard serve` says of itself, soon after it answers over HTTP. Raises ConfigError if it does not."""
    end_s = time.monotonic() + _ANNOUNCED_S
    while True:
        try:
            return find_run(urllib.parse.urlsplit(server.base_url).port)
        except ConfigError:
            if time.monotonic() > end_s:
                raise
            time.sleep(POLL_S)

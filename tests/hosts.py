"""Machines on a network of their own, on one computer: namespaces of the kernel (namespaces(7)), without a trace after.

A host has its own network, processes, host name, /tmp and /dev/shm. The cable of each ends in a switch that is a
namespace too and leads nowhere else. All of it needs root, and is gone when its processes are.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.serving import ROOT

_NETWORK = "10.77.0"
_CLONE_NEWNET = 0x40000000  # sched.h
# A host's own folders, in its /tmp: what runs there is no business of the others.
_ENVIRONMENT = {
    **os.environ,
    "XDG_RUNTIME_DIR": "/tmp/run",
    "XDG_STATE_HOME": "/tmp/state",
    "XDG_CONFIG_HOME": "/tmp/config",
}


def why_not() -> str | None:
    """What keeps this computer from having such hosts; None if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"there is no {tool}: install util-linux and iproute2"
    attempt = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"],
        capture_output=True,
        text=True,
    )
    return attempt.stderr.strip() or None if attempt.returncode else None


class _Space:
    """A namespace process and what runs beside it."""

    def __init__(self, *kinds: str, script: str = "") -> None:
        shell = f"{script} echo up; exec sleep infinity"
        # With the process that made them ends the first process of the namespaces, and so every other of them.
        self._maker = subprocess.Popen(
            ["unshare", *(f"--{kind}" for kind in kinds), "--fork", "--kill-child", "sh", "-ec", shell],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._maker.stdout is not None
        assert self._maker.stdout.readline() == "up\n", "no such namespaces here"
        (first,) = psutil.Process(self._maker.pid).children()
        self.pid = first.pid

    def enter(self, command: list[str]) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", *command]

    def do(self, *command: str) -> str:
        """Run a command to its end. Raises CalledProcessError."""
        return subprocess.run(self.enter(list(command)), check=True, capture_output=True, text=True).stdout

    @property
    def is_up(self) -> bool:
        return self._maker.poll() is None

    def end(self) -> None:
        self._maker.kill()
        self._maker.wait()
        assert self._maker.stdout is not None
        self._maker.stdout.close()


class Host:
    """One machine. `folder` is its /tmp, seen from outside."""

    def __init__(self, switch: _Space, number: int, name: str, folder: Path) -> None:
        folder.mkdir()
        self.name, self.folder = name, folder
        self.address = f"{_NETWORK}.{number}"
        self._switch, self._port = switch, f"port{number}"
        setup = f"{_own_tmp(folder)} mount -t tmpfs none /dev/shm; hostname {name}; ip link set lo up;"
        self._space = _Space("uts", "mount", "pid", "net", "mount-proc", script=setup)
        switch.do(
            "ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._space.pid)
        )
        switch.do("ip", "link", "set", self._port, "master", "switch", "up")
        self._space.do("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._space.do("ip", "link", "set", "eth0", "up")
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, log: str, *arguments: str) -> None:
        """`switchyard ARGUMENTS` on this host; what it says goes to the file `log` in its folder."""
        with (self.folder / log).open("wb") as output:
            self._running.append(
                subprocess.Popen(
                    self._space.enter([sys.executable, "-m", "ops.cli", *arguments]),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_ENVIRONMENT,
                    cwd=ROOT,
                )
            )

    def ask(self, *arguments: str) -> str:
        """What `switchyard ARGUMENTS` prints."""
        return self._output([sys.executable, "-m", "ops.cli", *arguments])

    def run_python(self, code: str, *arguments: str) -> str:
        """What the code prints, on this host."""
        return self._output([sys.executable, "-c", code, *arguments])

    def _output(self, command: list[str]) -> str:
        done = subprocess.run(self._space.enter(command), capture_output=True, text=True, env=_ENVIRONMENT, cwd=ROOT)
        assert done.returncode == 0, f"{self.name}: {command} has failed: {done.stderr[-4000:]}"
        return done.stdout

    def said(self, log: str) -> str:
        return (self.folder / log).read_text(encoding="utf-8", errors="replace")

    def enter_network(self) -> None:
        """From now on the calling thread's new sockets are this host's (setns(2))."""
        with Path(f"/proc/{self._space.pid}/ns/net").open("rb") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def listens_on(self, port: int) -> bool:
        """Whether a process of this host accepts TCP connections there."""
        return self._space.do("ss", "-tlnH", f"sport = :{port}") != ""

    def unplug(self) -> None:
        """Packets neither come nor go; nothing on this host is told."""
        self._switch.do("ip", "link", "set", self._port, "nomaster")

    def plug_in(self) -> None:
        self._switch.do("ip", "link", "set", self._port, "master", "switch")

    @property
    def is_up(self) -> bool:
        """False after end()."""
        return self._space.is_up

    def end(self) -> None:
        """All its processes are killed at once, as when the power fails."""
        self._space.end()
        for process in self._running:
            process.wait()


def _own_tmp(folder: Path) -> str:
    """Mounts a folder over /tmp; this checkout stays where it is, even if that is below /tmp."""
    commands = f"mount --rbind {folder} /tmp;"
    if ROOT.is_relative_to("/tmp"):
        place = folder / ROOT.relative_to("/tmp")
        commands = f"mkdir -p {place}; mount --bind {ROOT} {place}; {commands}"
    return commands


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[dict[str, Host]]:
    """Hosts by name, on one switch."""
    switch = _Space("net", script="ip link add switch type bridge; ip link set switch up;")
    hosts: dict[str, Host] = {}
    try:
        for number, name in enumerate(names, start=1):
            hosts[name] = Host(switch, number, name, folder / name)
        yield hosts
    finally:
        for host in hosts.values():
            host.end()
        switch.end()

"""Doing a fault to a running cluster on this machine: real signals to real processes, or an order to a worker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.errors import SwitchyardError
from cluster.sabotage import BY_WORKER, Fault, Sabotage
from ops.bench.fault_row import Status, online

STRIKE_LIMIT_S = 30.0
# These befall one answer; others go on until somebody has dealt with the process.
_ONCE = frozenset({Fault.DROPPED_REPLY, Fault.DOUBLED_REPLY, Fault.TRUNCATED_FRAME})


class StrikeFailed(SwitchyardError):
    """The fault could not be done, so nothing was tested."""


@dataclass(frozen=True)
class Victim:
    """A process: its number, and its id in the status."""

    id: str
    pid: int


def victims(fault: Fault, status: Status) -> list[Victim]:
    """One worker of every shard, or the expert router, or an engine."""
    if fault is Fault.ROUTER_LOSS:
        return [Victim("router", status["router"]["pid"])]
    if fault is Fault.ENGINE_LOSS:
        return [_victim(status["engines"][0])]
    return [_victim(online(shard)[0]) for shard in status["shards"]]


def _victim(entry: Mapping[str, Any]) -> Victim:
    return Victim(entry["id"], entry["pid"])


@contextlib.contextmanager
def strike(fault: Fault, victim: Victim) -> Iterator[None]:
    """The fault has struck when this is entered; if it is one that is ordered, it ends when this is left.

    Raises StrikeFailed.
    """
    if fault in BY_WORKER:
        sabotage = Sabotage(victim.pid, fault, int(fault in _ONCE))
        try:
            if not sabotage.wait_struck(STRIKE_LIMIT_S):
                raise StrikeFailed(f"{fault.value} has not met a call of {victim.id} in {STRIKE_LIMIT_S:.0f} s")
            yield
        finally:
            sabotage.close()
        return
    pid = _engine_core(victim.pid) if fault is Fault.ENGINE_LOSS else victim.pid
    try:
        os.kill(pid, signal.SIGSTOP if fault is Fault.SIGSTOP else signal.SIGKILL)
    except ProcessLookupError:
        raise StrikeFailed(f"{victim.id}: process {pid} has ended before it could be struck") from None
    yield


def _engine_core(replica_pid: int) -> int:
    """The process of vLLM's scheduler."""
    from deployments.vllm_app import engine_processes

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in engine_processes(replica_pid):
            return int(process.pid)
    raise StrikeFailed(f"process {replica_pid} has no EngineCore")

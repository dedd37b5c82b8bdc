"""The process of one expert worker: `python -m model.worker_main`. Experts, kernels and the data plane, nothing else.

A process of its own, because OpenMP takes its thread count, binding and spinning from the environment at start, and
because no other thread shall hold the interpreter while a layer call waits.

Its parent speaks JSON lines. On stdin, first the order (see Order), then commands; on stdout, reports:
    stdin   {"model", "dtype", "shard": {..}, "secret": hex, "num_threads", "max_tokens", "tcp_host",
             "fault_injection"}
            or first {"warm": {"model", "dtype"}}, for a spare: have everything imported, and wait for the order
            {"command": "stats" | "load" | "drain"}
    stdout  {"stage": text}          while loading
            {"warm": {}}             the spare may be given an order
            {"ready": {"endpoint": {..}, "fingerprint", "memory_bytes"}}
            {"failed": text}         loading failed; the process exits
            answers, in order: {"stats": {..}} {"load": {"tokens", "messages", "waiting", "device": text,
            "fault": empty if sound, "expert_tokens": [layer][local expert]}}
            {"drained": bool}, false if something taken was not answered in time
End of stdin means that the parent is gone or wants it to stop: the worker answers what it has taken and exits.
The secret comes by stdin so that it is in no environment, command line or file.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from cluster.errors import IntegrityError, SwitchyardError
from cluster.routing import Shard

_DRAIN_LIMIT_S = 4.0  # less than the parent waits for the answer (deployments/expert_worker.py)


def main() -> int:
    """Load, report, serve until stdin ends. Exit status 0 after serving, 1 when loading failed."""
    _die_with_parent()
    reports = _take_stdout()

    def report(**message: Any) -> None:
        print(json.dumps(message, default=_plain), file=reports, flush=True)

    try:
        order = _order(report)
        if order is None:
            return 0
        server, ready = _load(order, lambda stage: report(stage=stage))
        device = _device(order["num_threads"])
    # The top of this process: whatever stopped the loading is for the parent to tell, the traceback for the log.
    except Exception as error:
        traceback.print_exc()
        report(failed=str(error) if isinstance(error, SwitchyardError) else f"{type(error).__name__}: {error}")
        return 1
    report(ready=ready)
    threading.Thread(target=_obey, args=(server, device, report), daemon=True).start()
    server.serve_forever()
    return 0


def _order(report) -> dict[str, Any] | None:
    """The order, for a spare after it has warmed up; None when stdin ends first."""
    order = json.loads(sys.stdin.readline())
    if "warm" in order:
        from model.hosted_experts import warm_up

        warm_up(order["warm"]["model"], order["warm"]["dtype"])
        report(warm={})
        line = sys.stdin.readline()
        if not line:
            return None
        order = json.loads(line)
    return dict(order)


def _plain(value: Any) -> Any:
    """numpy arrays and scalars as JSON."""
    return value.tolist()


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens (prctl(2), PR_SET_PDEATHSIG)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _take_stdout() -> TextIO:
    """Keep the real stdout for reports and send everything that libraries print to stderr."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reports


def _load(order: dict[str, Any], progress) -> tuple[Any, dict[str, Any]]:
    from cluster.sabotage import SabotagedServer, Saboteur
    from cluster.server import ExpertServer
    from model.hosted_experts import HostedExperts

    shard = Shard(**{**order["shard"], "experts": tuple(order["shard"]["experts"])})
    hosted = HostedExperts.load(
        order["model"],
        order["dtype"],
        shard,
        num_threads=order["num_threads"],
        max_tokens=order["max_tokens"],
        progress=progress,
    )
    spec = hosted.spec
    server = (SabotagedServer if order["fault_injection"] else ExpertServer)(
        compute=hosted.compute,
        secret=bytes.fromhex(order["secret"]),
        model_fingerprint=spec.fingerprint,
        hidden_size=spec.hidden_size,
        top_k=spec.top_k,
        dtype=spec.dtype,
        layers=range(shard.first_layer, shard.end_layer),
        num_local_experts=len(shard.experts),
        tcp_host=order["tcp_host"],
        max_tokens=order["max_tokens"],
    )
    if isinstance(server, SabotagedServer):
        Saboteur(server)
    ready = {
        "endpoint": dataclasses.asdict(server.endpoint),
        "fingerprint": spec.fingerprint,
        "memory_bytes": hosted.memory_bytes,
    }
    return server, ready


def _device(num_threads: int) -> str:
    """What computes, for people."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {num_threads} threads"


def _obey(server: Any, device: str, report) -> None:
    for line in sys.stdin:
        command = json.loads(line)["command"]
        if command == "stats":
            report(stats=server.stats())
        elif command == "load":
            expert_tokens = server.stats()["expert_tokens"]
            report(load={**server.load(), "device": device, "fault": _fault(server), "expert_tokens": expert_tokens})
        elif command == "drain":
            server.drain()
            report(drained=server.wait_drained(_DRAIN_LIMIT_S))
    server.stop()


def _fault(server: Any) -> str:
    """What check_integrity() finds; empty when all is well."""
    try:
        server.check_integrity()
    except IntegrityError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # vLLM's end of the interpreter takes two seconds, in which a drained worker keeps its memory

"""The process of one expert worker, forked by model/nursery.py. Experts, kernels and the data plane, nothing else.

A process of its own, because no other thread shall hold the interpreter while a layer call waits, and because a crash
of a kernel shall end no more than this.

Its replica speaks JSON lines. On stdin, first the order (see Order), then commands; on stdout, reports:
    stdin   {"model", "dtype", "shard": {..}, "secrets": [hex, ..], "cores": [..], "max_tokens", "tcp_host", "tls",
             "fault_injection", "in_host_memory"}
            or first {"warm": {"model", "dtype", "in_host_memory"}}, for a spare: have everything imported, and wait for
            the order
            {"command": "stats" | "load" | "metrics" | "drain"} or {"command": "secrets", "accepted": [hex, ..]}
    stdout  {"stage": text}          while loading
            {"warm": {}}             the spare may be given an order
            {"ready": {"endpoint": {..}, "fingerprint", "memory_bytes", "device"}}
            {"failed": text}         loading failed; the process exits
            answers, in order: {"stats": {..}} {"load": {"tokens", "messages", "compute_s", "waiting", "fault": empty
            if sound, "expert_tokens": see cluster/expert_load.py}}
            {"metrics": {..}} (cluster/measures.py) {"drained": bool}, false if something taken was not answered in time
            {"secrets": {}}          from now on engines prove one of those
End of stdin means that the replica is gone or wants it to stop: the worker answers what it has taken and exits.
Secrets come by stdin so that they are in no environment, command line or file.
"""

import dataclasses
import json
import os
import select
import sys
import threading
import traceback
from typing import Any, TextIO

from cluster.errors import IntegrityError, SwitchyardError
from cluster.routing import Shard

_DRAIN_LIMIT_S = 4.0  # less than the parent waits for the answer (deployments/expert_worker.py)


def main() -> int:
    """Load, report, serve until stdin ends. Exit status 0 after serving, 1 when loading failed."""
    loading = threading.Event()
    loading.set()
    threading.Thread(target=_end_with_stdin, args=(loading,), daemon=True).start()
    reports = _take_stdout()

    def report(**message: Any) -> None:
        print(json.dumps(message, default=_plain), file=reports, flush=True)

    try:
        order = _order(report)
        if order is None:
            return 0
        server, ready = _load(order, lambda stage: report(stage=stage))
    # The top of this process: whatever stopped the loading is for the parent to tell, the traceback for the log.
    except Exception as error:
        traceback.print_exc()
        report(failed=str(error) if isinstance(error, SwitchyardError) else f"{type(error).__name__}: {error}")
        return 1
    loading.clear()
    report(ready=ready)
    threading.Thread(target=_obey, args=(server, report), daemon=True).start()
    server.serve_forever()
    return 0


def _order(report) -> dict[str, Any] | None:
    """The order, for a spare after it has warmed up; None when stdin ends first."""
    order = json.loads(sys.stdin.readline())
    if "warm" in order:
        from model.hosted_experts import warm_up

        warm_up(**order["warm"])
        report(warm={})
        line = sys.stdin.readline()
        if not line:
            return None
        order = json.loads(line)
    return dict(order)


def _plain(value: Any) -> Any:
    """numpy arrays and scalars as JSON."""
    return value.tolist()


def _end_with_stdin(loading: threading.Event) -> None:
    """What loads for minutes reads no stdin, and so would not notice that nobody wants it any more."""
    poll = select.poll()
    poll.register(0, 0)  # hang-ups only
    poll.poll()
    if loading.is_set():
        os._exit(1)


def _take_stdout() -> TextIO:
    """Keep the real stdout for reports and send everything that libraries print to stderr."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reports


def _load(order: dict[str, Any], progress) -> tuple[Any, dict[str, Any]]:
    from cluster.sabotage import SabotagedServer, Saboteur
    from cluster.server import ExpertServer
    from cluster.tls import server_tls
    from model.hosted_experts import HostedExperts
    from model.kernel_threads import start_kernel_threads

    start_kernel_threads(order["cores"])
    shard = Shard(**{**order["shard"], "experts": tuple(order["shard"]["experts"])})
    hosted = HostedExperts.load(
        order["model"],
        order["dtype"],
        shard,
        num_threads=len(order["cores"]),
        max_tokens=order["max_tokens"],
        progress=progress,
        in_host_memory=order["in_host_memory"],
    )
    spec = hosted.spec
    secrets = _secrets(order["secrets"])
    server = (SabotagedServer if order["fault_injection"] else ExpertServer)(
        compute=hosted.compute,
        secret=secrets[0],
        model_fingerprint=spec.fingerprint,
        hidden_size=spec.hidden_size,
        top_k=spec.top_k,
        dtype=spec.dtype,
        layers=range(shard.first_layer, shard.end_layer),
        num_local_experts=len(shard.experts),
        tcp_host=order["tcp_host"],
        max_tokens=order["max_tokens"],
        tls=server_tls(order["tls"], order["tcp_host"]),
    )
    server.take_secrets(secrets)
    if isinstance(server, SabotagedServer):
        Saboteur(server)
    ready = {
        "endpoint": dataclasses.asdict(server.endpoint),
        "fingerprint": spec.fingerprint,
        "memory_bytes": hosted.memory_bytes,
        "device": hosted.device,
    }
    return server, ready


def _obey(server: Any, report) -> None:
    for line in sys.stdin:
        order = json.loads(line)
        command = order["command"]
        if command == "stats":
            report(stats=server.stats())
        elif command == "load":
            report(load={**server.load(), "fault": _fault(server)})
        elif command == "metrics":
            report(metrics=server.metrics())
        elif command == "drain":
            server.drain()
            report(drained=server.wait_drained(_DRAIN_LIMIT_S))
        elif command == "secrets":
            server.take_secrets(_secrets(order["accepted"]))
            report(secrets={})
    server.stop()


def _secrets(in_hex: list[str]) -> list[bytes]:
    return [bytes.fromhex(each) for each in in_hex]


def _fault(server: Any) -> str:
    """What check_integrity() finds; empty when all is well."""
    try:
        server.check_integrity()
    except IntegrityError as error:
        return str(error)
    return ""

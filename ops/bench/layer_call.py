"""`switchyard bench layer-call`: what one layer call costs beside the kernel, between two processes on this machine.

A toy worker (cluster/fakes.py) whose kernel does next to nothing answers one engine's dispatcher over shared memory, so
what is measured is the hot path alone: dispatch, wire, batching, combining, and the bookkeeping of all four.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.dispatcher import Dispatcher

ENGINE_ID = "bench"
_WARM_UP_CALLS = 500
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call of so many tokens: quantiles over all calls, and CPU time of both processes, a mean.

    On a machine that does other things too the CPU time and p10 are what to compare.
    """

    num_tokens: int
    p10_us: float
    p50_us: float
    engine_cpu_us: float
    worker_cpu_us: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench layer-call`."""
    parser.add_argument("--calls", type=int, default=20_000, metavar="N", help="layer calls per size (default 20000)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 32], metavar="T", help="tokens of a call (default 1 32)"
    )
    parser.add_argument("--hidden", type=int, default=1024, metavar="D", help="hidden size (default 1024)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Raises ConfigError for counts below 1."""
    if min(arguments.calls, arguments.hidden, *arguments.tokens) < 1:
        raise ConfigError("--calls, --tokens and --hidden: must be 1 or more.")
    costs = measure(arguments.hidden, arguments.tokens, arguments.calls)
    if arguments.json:
        print(json.dumps([vars(cost) for cost in costs]))
        return 0
    print(f"{'tokens':>6}  {'p10 us':>8}  {'p50 us':>8}  {'engine CPU us':>13}  {'worker CPU us':>13}")
    for cost in costs:
        print(
            f"{cost.num_tokens:>6}  {cost.p10_us:>8.1f}  {cost.p50_us:>8.1f}  {cost.engine_cpu_us:>13.1f}  "
            f"{cost.worker_cpu_us:>13.1f}"
        )
    return 0


def measure(hidden: int, sizes: Sequence[int], num_calls: int) -> list[Cost]:
    """`num_calls` calls of each size, one after the other, to a worker in a process of its own."""
    import torch

    from cluster.dispatcher import Dispatcher
    from cluster.fakes import ProcessWorker, ToyShape
    from cluster.placement import partition

    torch.set_num_threads(1)  # no team of kernel threads to put to sleep: that is not bookkeeping
    shape = ToyShape(hidden=hidden, max_tokens=max(sizes), dtype=torch.bfloat16)
    shards = partition(shape.num_layers, shape.num_experts, 1)
    worker = ProcessWorker(shape, shards[0])
    dispatcher = Dispatcher(
        engine_id=ENGINE_ID,
        secret=shape.secret,
        hidden_size=hidden,
        top_k=shape.top_k,
        dtype=shape.dtype,
        max_tokens=shape.max_tokens,
        expert_timeout_s=_TIMEOUT_S,
    )
    try:
        dispatcher.update(shape.table(1, shards, [worker.replica("toy")]))
        worker_process = psutil.Process(worker.process.pid)
        return [_cost(dispatcher, worker_process, shape.top_k, hidden, size, num_calls) for size in sizes]
    finally:
        dispatcher.close()
        worker.kill()


def _cost(
    dispatcher: "Dispatcher", worker: psutil.Process, top_k: int, hidden: int, num_tokens: int, num_calls: int
) -> Cost:
    import torch

    x_TD = torch.ones(num_tokens, hidden, dtype=torch.bfloat16)
    weights_TK = torch.full((num_tokens, top_k), 1 / top_k)
    ids_TK = torch.arange(top_k, dtype=torch.int32).repeat(num_tokens, 1)
    out_TD = torch.empty_like(x_TD)

    def call() -> None:
        dispatcher.finish(dispatcher.start(0, x_TD, weights_TK, ids_TK, ring=False), out_TD)

    for _ in range(_WARM_UP_CALLS):
        call()
    took_ns = []
    engine_s, worker_s = time.thread_time(), _cpu_s(worker)
    for _ in range(num_calls):
        begin_ns = time.monotonic_ns()
        call()
        took_ns.append(time.monotonic_ns() - begin_ns)
    engine_s, worker_s = time.thread_time() - engine_s, _cpu_s(worker) - worker_s
    took_ns.sort()
    p10_us, p50_us = (took_ns[int(num_calls * share)] / 1000 for share in (0.1, 0.5))
    return Cost(num_tokens, p10_us, p50_us, engine_s / num_calls * 1e6, worker_s / num_calls * 1e6)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

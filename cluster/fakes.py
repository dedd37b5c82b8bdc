"""Stand-ins for the real things, for tests and measurements. They import nothing of what they fake.

ToyExperts     a ComputeFn with arithmetic anybody can check: expert e turns x into x * (e + 1) / 8 + layer
LocalExperts   Dispatcher's start/finish without workers: the oracle for everything that moves tokens
ToyShape       the sizes that toy workers and their engines agree on
ThreadWorker   an ExpertServer around ToyExperts (or any ComputeFn) in a thread of this process
ProcessWorker  the same in a process of its own, which can be killed; `python -m cluster.fakes '{...}'`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.batching import ComputeFn
from cluster.errors import ConnectionLost
from cluster.routing import Endpoint, Replica, ReplicaState, RoutingTable, Shard
from cluster.server import ExpertServer


class ToyExperts:
    """Experts of one shard: out_t = sum over k of weight * (x * (e + 1) / 8 + layer), summed in float32."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._scale = torch.tensor([*((e + 1) / 8 for e in experts), 0.0])  # the last element answers id -1
        self._here = torch.tensor([*(1.0 for _ in experts), 0.0])
        self.num_calls = 0

    def compute(
        self,
        layer: int,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TD: torch.Tensor,
        complete: bool = False,
    ) -> None:
        """A ComputeFn."""
        self.num_calls += 1
        ids = ids_TK.long()
        scale_T1 = (weights_TK * self._scale[ids]).sum(1, keepdim=True)
        shift_T1 = (weights_TK * self._here[ids]).sum(1, keepdim=True) * layer
        out_TD.copy_(x_TD.float() * scale_T1 + shift_T1)


class LocalExperts:
    """start/finish like a Dispatcher's, computed in this process at finish(): no transport, no batching, no failure.

    `parts` are shards with the ComputeFn of each; partial sums are rounded to the dtype of x and added in float32 in
    the order given, as a Dispatcher does.
    """

    def __init__(self, parts: Sequence[tuple[Shard, ComputeFn]], num_experts: int) -> None:
        self._parts = list(parts)
        self._num_experts = num_experts
        self._calls: dict[int, tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._last_ticket = 0
        self._num_calls = 0

    @classmethod
    def whole(cls, compute: ComputeFn, num_layers: int, num_experts: int) -> LocalExperts:
        """One ComputeFn that holds everything; local ids are global ids."""
        return cls([(Shard(0, tuple(range(num_experts)), 0, num_layers), compute)], num_experts)

    def update(self, table: RoutingTable) -> None:
        """Nothing to learn from a table here."""

    def start(
        self,
        layer: int,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        *,
        ring: bool = True,
    ) -> int:
        self._last_ticket += 1
        self._calls[self._last_ticket] = (layer, x_TD.clone(), topk_weights_TK.clone(), topk_ids_TK.clone())
        return self._last_ticket

    def finish(self, ticket: int, out_TD: torch.Tensor) -> None:
        layer, x_TD, weights_TK, ids_TK = self._calls.pop(ticket)
        total_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for shard, compute in self._parts:
            if not shard.first_layer <= layer < shard.end_layer:
                continue
            lookup = torch.full((self._num_experts + 1,), -1, dtype=torch.int32)
            lookup[torch.tensor(shard.experts)] = torch.arange(len(shard.experts), dtype=torch.int32)
            local_TK = lookup[ids_TK.long()]
            rows = (local_TK >= 0).any(1).nonzero().flatten()
            if len(rows):
                partial_tD = torch.empty_like(x_TD[rows])
                here_tK = local_TK[rows]
                compute(layer, x_TD[rows], weights_TK[rows], here_tK, partial_tD, bool((here_tK >= 0).all()))
                total_TD[rows] += partial_tD.float()
        out_TD.copy_(total_TD)
        self._num_calls += 1

    def stats(self) -> dict[str, Any]:
        return {"calls": self._num_calls, "open_calls": len(self._calls)}

    def check_integrity(self) -> None:
        """Always sound."""

    def close(self) -> None:
        self._calls.clear()


@dataclass(frozen=True)
class ToyShape:
    """What toy workers and their engines agree on."""

    num_layers: int = 3
    num_experts: int = 8
    hidden: int = 16
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    max_tokens: int = 32
    fingerprint: str = "toy"
    secret: bytes = b"a secret of more than 16 bytes"

    def table(self, epoch: int, shards: Sequence[Shard], replicas: Sequence[Replica]) -> RoutingTable:
        return RoutingTable(epoch, self.fingerprint, self.num_layers, self.num_experts, tuple(shards), tuple(replicas))


class ThreadWorker:
    """An expert server in a daemon thread. `tcp` makes replica() look as if it were on another host."""

    def __init__(
        self,
        shape: ToyShape,
        shard: Shard,
        compute: ComputeFn | None = None,
        tcp: bool = False,
        server: type[ExpertServer] = ExpertServer,
        **options: Any,
    ) -> None:
        self.toy = ToyExperts(shard.experts)
        self._shard_id = shard.shard_id
        self._tcp = tcp
        settings: dict[str, Any] = {
            "secret": shape.secret,
            "model_fingerprint": shape.fingerprint,
            "hidden_size": shape.hidden,
            "top_k": shape.top_k,
            "dtype": shape.dtype,
            "max_tokens": shape.max_tokens,
        }
        self.server = server(
            compute=compute or self.toy.compute,
            layers=range(shard.first_layer, shard.end_layer),
            num_local_experts=len(shard.experts),
            **{**settings, **options},
        )
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def replica(self, replica_id: str, state: ReplicaState = ReplicaState.ONLINE) -> Replica:
        endpoint = self.server.endpoint
        if self._tcp:
            endpoint = replace(endpoint, host_id="elsewhere")
        return Replica(replica_id, self._shard_id, endpoint, state, os.getpid(), "here")

    def close(self) -> None:
        """Stop, and check the server's accounts."""
        self.server.stop()
        self.thread.join()
        self.server.check_integrity()


class ProcessWorker:
    """A toy worker in its own process. `announce_calls` makes wait_for_call() work; `hang_s` delays every call."""

    def __init__(self, shape: ToyShape, shard: Shard, announce_calls: bool = False, hang_s: float = 0.0) -> None:
        settings = {
            "experts": shard.experts,
            "announce_calls": announce_calls,
            "hang_s": hang_s,
            "shape": {**vars(shape), "dtype": str(shape.dtype).removeprefix("torch."), "secret": shape.secret.hex()},
        }
        command = [sys.executable, "-m", "cluster.fakes", json.dumps(settings)]
        root = str(Path(__file__).resolve().parent.parent)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        self._shard_id = shard.shard_id
        self.endpoint = Endpoint(**json.loads(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def replica(self, replica_id: str) -> Replica:
        return Replica(replica_id, self._shard_id, self.endpoint, ReplicaState.ONLINE, self.process.pid, "here")

    def wait_for_call(self) -> None:
        """Block until the kernel began to work on a call."""
        if self._line() != "computing\n":
            raise ConnectionLost("the worker ended")

    def kill(self) -> None:
        """SIGKILL, and reap. Idempotent."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether `condition` became true in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.002)
    return True


def main(argv: list[str]) -> None:
    """Run one toy worker until stdin ends, as it does when the parent dies; prints its endpoint as JSON when ready."""
    settings = json.loads(argv[0])
    fields = settings["shape"]
    secret, dtype = bytes.fromhex(fields.pop("secret")), getattr(torch, fields.pop("dtype"))
    shape = ToyShape(secret=secret, dtype=dtype, **fields)
    shard = Shard(0, tuple(settings["experts"]), 0, shape.num_layers)
    toy = ToyExperts(shard.experts)
    torch.set_num_threads(1)

    def compute(
        layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, complete: bool
    ) -> None:
        if settings["announce_calls"]:
            print("computing", flush=True)
        time.sleep(settings["hang_s"])
        toy.compute(layer, x, weights, ids, out, complete)

    worker = ThreadWorker(shape, shard, compute)
    print(json.dumps(vars(worker.server.endpoint)), flush=True)
    sys.stdin.read()
    worker.close()


if __name__ == "__main__":
    main(sys.argv[1:])

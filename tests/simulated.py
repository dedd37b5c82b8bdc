"""A cluster that exists only as numbers: statuses as deployments.control.Control gives them, at any size."""

import random
import threading
import time
from typing import Any

NODE_WORKERS = 8


class SimulatedCluster:
    """Control without a cluster. Times go by, loads vary with every status(), drain() and kill() take workers out."""

    def __init__(self, shards: int, replicas: int, layers: int = 64, experts: int | None = None) -> None:
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self._begin_s = time.time() - 600
        self.layers, self.experts = layers, experts or shards
        self.epoch = 1_764_000_000_000
        self.events: list[dict[str, Any]] = [self._event(5, "router_started", "router", f"epoch {self.epoch}")]
        self.wanted = dict.fromkeys(range(shards), replicas)
        self.workers: dict[str, tuple[int, str]] = {}  # id -> shard, state
        for shard in range(shards):
            for _ in range(replicas):
                self._add(shard)
        self.tokens = [[0] * self.experts for _ in range(layers)]

    def _event(self, after_s: float, kind: str, subject: str, text: str) -> dict[str, Any]:
        return {"time_s": self._begin_s + after_s, "kind": kind, "subject": subject, "text": text}

    def _tell(self, kind: str, subject: str, text: str) -> None:
        self.epoch += 1
        self.events.append({"time_s": time.time(), "kind": kind, "subject": subject, "text": text})

    def _add(self, shard: int) -> None:
        name = f"experts-{shard}-{self._random.getrandbits(32):08x}"
        self.workers[name] = (shard, "online")
        self.events.append(self._event(30 + len(self.workers) / 10, "worker_online", name, f"shard {shard}, pid 1"))

    def kill(self, worker: str) -> None:
        """A worker's process ends."""
        with self._lock:
            shard, _ = self.workers.pop(worker)
            self._tell("worker_lost", worker, f"shard {shard}: its process ended with status -9")

    def drain(self, worker: str, *, replace: bool, say: Any) -> None:
        shard, _ = self.workers[worker]
        say(f"{worker} takes nothing new and finishes what it has")
        with self._lock:
            self._tell("worker_draining", worker, f"shard {shard}")
            del self.workers[worker]
            self.wanted[shard] -= 1
            self._tell("worker_left", worker, f"shard {shard}: drained")
        say(f"{worker} has left")

    def scale(self, shard: int, replicas: int, *, say: Any) -> None:
        with self._lock:
            self.wanted[shard] = replicas

    def restart(self, workers: list[str], *, say: Any) -> None:
        say(f"restarting {len(workers) or len(self.workers)}")

    def check_integrity(self) -> list[dict[str, Any]]:
        return []

    def expert_load(self) -> list[list[int]]:
        for layer, row in enumerate(self.tokens):
            for expert in range(self.experts):
                row[expert] += int(self._random.expovariate(1 / (20 + 60 * (hash((layer, expert)) % 97 < 9))))
        return [list(row) for row in self.tokens]

    def pulse(self, known: int, wait_s: float) -> int:
        """Here something happens all the time."""
        threading.Event().wait(min(wait_s, 0.25))
        return known + 1

    def status(self) -> dict[str, Any]:
        with self._lock:
            names = list(self.workers)
            online = {shard for shard, _ in self.workers.values()}
            return {
                "model": "grok-2",
                "epoch": self.epoch,
                "router": {"pid": 1, "node": "node-0"},
                "missing_shards": sorted(set(self.wanted) - online),
                "shards": [self._shard(shard, names) for shard in self.wanted],
                "spares": [],
                "engines": [self._engine(number) for number in range(4)],
                "events": list(self.events)[-1000:],
                "progress": {},
            }

    def nodes(self) -> list[dict[str, Any]]:
        return [self._node(number) for number in range(-(-max(len(self.workers), 1) // NODE_WORKERS))]

    def _node(self, number: int) -> dict[str, Any]:
        return {
            "id": f"node-{number}",
            "name": f"gpu-{number:03d}",
            "address": f"10.0.{number // 250}.{number % 250}",
            "alive": True,
            "cpus": 64.0,
            "gpus": float(NODE_WORKERS),
            "memory_bytes": float(512 << 30),
        }

    def _shard(self, shard: int, names: list[str]) -> dict[str, Any]:
        size, extra = divmod(self.experts, len(self.wanted))
        first = shard * size + min(shard, extra)
        experts = list(range(first, first + size + (shard < extra)))
        return {
            "id": shard,
            "layers": [0, self.layers],
            "experts": experts,
            "num_experts": len(experts),
            "wanted": self.wanted[shard],
            "replicas": [
                self._replica(name, number) for number, name in enumerate(names) if self.workers[name][0] == shard
            ],
        }

    def _replica(self, name: str, number: int) -> dict[str, Any]:
        return {
            "id": name,
            "pid": 10_000 + number,
            "node": f"node-{number // NODE_WORKERS}",
            "state": self.workers[name][1],
            "role": "primary",
            "load": {
                "tokens": 1000,
                "messages": 100,
                "waiting": self._random.randrange(3),
                "tokens_per_s": self._random.uniform(200, 900),
                "fault": "",
            },
            "memory_bytes": 24 << 30,
            "device": f"GPU {number % NODE_WORKERS}",
            "node_name": f"node-{number // NODE_WORKERS}",
            "age_s": time.time() - self._begin_s,
        }

    def _engine(self, number: int) -> dict[str, Any]:
        age_s = time.time() - self._begin_s
        tokens = 2500.0 * age_s / 4
        first = [tokens / 400, tokens / 210, tokens / 201, tokens / 200]
        between = [tokens * 0.1, tokens * 0.9, tokens * 0.99, tokens]
        return {
            "id": f"engine-{number:08x}",
            "pid": 900 + number,
            "node": f"node-{number}",
            "state": "ready",
            "load": {
                "running": float(self._random.randrange(8, 32)),
                "waiting": float(self._random.randrange(3)),
                "kv_cache_used": self._random.uniform(0.3, 0.6),
                "prompt_tokens": 3 * tokens,
                "generated_tokens": tokens,
                "finished": tokens / 200,
                "first_token_s": {"le_s": [0.1, 0.25, 0.5], "counts": first},
                "inter_token_s": {"le_s": [0.01, 0.025, 0.05], "counts": between},
            },
            "age_s": age_s,
        }


ABOUT = {
    "model": "grok-2",
    "folder": "/models/grok-2",
    "http": "http://127.0.0.1:9",
    "version": "0.1.0",
    "started_s": 1_764_000_000.0,
    "layers": 64,
    "experts": 8,
    "top_k": 2,
    "hidden_size": 8192,
    "dtype": "torch.bfloat16",
    "checkpoint_bytes": 540 << 30,
    "expert_bytes": 450 << 30,
    "planned": {"engines": 4, "engine_range": [4, 4], "shards": 8, "replicas": 64},
    "has_tokenizer": True,
    "licence": {
        "name": "Grok 2 Community License",
        "basis": "/models/grok-2 has no licence file and its weights have the dimensions of the release",
        "conditions": ["Commercial use only by companies with less than US$1 million of yearly revenue."],
        "attribution": "Powered by xAI",
    },
}

"""The routing table: who holds which experts, as an immutable, numbered snapshot.

Layers are MoE-layer ordinals: 0..num_layers-1, counting only MoE layers, in model order.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import InvalidTable

_T = TypeVar("_T")
_E = TypeVar("_E", bound=enum.Enum)


class ReplicaState(enum.Enum):
    """Life of a replica. Only ONLINE replicas are given new calls."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    GONE = "gone"


class Role(enum.Enum):
    """What a replica is for."""

    PRIMARY = "primary"
    SHADOW = "shadow"
    """In host memory, slower: asked only where no primary can be."""
    SPARE = "spare"
    """A warm spare that has adopted a shard; asked like a primary."""


@dataclass(frozen=True)
class Endpoint:
    """Where a worker listens. `unix_name` is an abstract unix socket's name, without the leading NUL."""

    host_id: str
    unix_name: str
    tcp_host: str
    tcp_port: int
    tls: bool = False
    """Whether its TCP port speaks TLS (cluster/tls.py)."""


@dataclass(frozen=True)
class Replica:
    """One of the interchangeable workers of a shard."""

    replica_id: str
    shard_id: int
    endpoint: Endpoint
    state: ReplicaState
    pid: int
    node: str
    role: Role = Role.PRIMARY


@dataclass(frozen=True)
class Shard:
    """Experts that travel together: `experts` (global ids) of the MoE layers [first_layer, end_layer).

    A worker's local expert id is an index into `experts`.
    """

    shard_id: int
    experts: tuple[int, ...]
    first_layer: int
    end_layer: int


@dataclass(frozen=True)
class RoutingTable:
    """Who holds what, at one moment. A larger `epoch` is newer."""

    epoch: int
    model_fingerprint: str
    num_layers: int
    num_experts: int
    shards: tuple[Shard, ...]
    replicas: tuple[Replica, ...]

    def validate(self) -> None:
        """Raise InvalidTable unless every (layer, expert) is in exactly one shard and every id is known and unique."""
        _require(self.epoch >= 0, f"epoch {self.epoch} is negative")
        _require(self.num_layers >= 1 and self.num_experts >= 1, "a table needs at least one layer and one expert")
        _unique("shard_id", [s.shard_id for s in self.shards])
        _unique("replica_id", [r.replica_id for r in self.replicas])
        known = {s.shard_id for s in self.shards}
        for replica in self.replicas:
            _require(replica.shard_id in known, f"replica {replica.replica_id} names unknown shard {replica.shard_id}")
        _check_cover(self)

    def with_replica(self, replica: Replica) -> RoutingTable:
        """A newer table in which `replica` is added, or replaces the one with its id."""
        others = tuple(r for r in self.replicas if r.replica_id != replica.replica_id)
        return replace(self, epoch=self.epoch + 1, replicas=(*others, replica))

    def without(self, replica_id: str) -> RoutingTable:
        """A newer table without that replica (also newer when it was not there)."""
        others = tuple(r for r in self.replicas if r.replica_id != replica_id)
        return replace(self, epoch=self.epoch + 1, replicas=others)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` is the inverse."""
        return {
            "epoch": self.epoch,
            "model_fingerprint": self.model_fingerprint,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "shards": [
                {
                    "shard_id": s.shard_id,
                    "experts": list(s.experts),
                    "first_layer": s.first_layer,
                    "end_layer": s.end_layer,
                }
                for s in self.shards
            ],
            "replicas": [_replica_to_json(r) for r in self.replicas],
        }

    @classmethod
    def from_json(cls, data: object) -> RoutingTable:
        """Strict inverse of `to_json`: unknown or missing keys and wrong types raise InvalidTable; then validates."""
        fields = _object(data, "table", "epoch model_fingerprint num_layers num_experts shards replicas")
        table = cls(
            epoch=_typed(fields["epoch"], int, "epoch"),
            model_fingerprint=_typed(fields["model_fingerprint"], str, "model_fingerprint"),
            num_layers=_typed(fields["num_layers"], int, "num_layers"),
            num_experts=_typed(fields["num_experts"], int, "num_experts"),
            shards=_tuple_of(fields["shards"], "shards", _shard_from_json),
            replicas=_tuple_of(fields["replicas"], "replicas", _replica_from_json),
        )
        table.validate()
        return table


@cache
def host_id() -> str:
    """Identity of this process's kernel boot, network namespace and time namespace.

    Two processes with equal host ids reach each other over abstract unix sockets, can share memory that is passed along
    them, and read the same monotonic clock.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    spaces = [path for kind in ("net", "time") if (path := Path("/proc/self/ns", kind)).exists()]
    return "-".join([boot, *(str(path.stat().st_ino) for path in spaces)])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidTable(message)


def _unique(what: str, ids: list[Any]) -> None:
    if len(set(ids)) != len(ids):
        raise InvalidTable(f"{what} appears twice: {sorted(i for i in set(ids) if ids.count(i) > 1)}")


def _check_cover(table: RoutingTable) -> None:
    """Every expert of every layer in exactly one shard. Layers between two shard borders are alike: check one."""
    borders = {0}
    for s in table.shards:
        ok = 0 <= s.first_layer < s.end_layer <= table.num_layers
        _require(ok, f"shard {s.shard_id} spans layers [{s.first_layer}, {s.end_layer}) of {table.num_layers}")
        borders.update((s.first_layer, s.end_layer))
    for layer in sorted(borders - {table.num_layers}):
        held = sorted(e for s in table.shards if s.first_layer <= layer < s.end_layer for e in s.experts)
        if held != list(range(table.num_experts)):
            missing = sorted(set(range(table.num_experts)) - set(held))
            wrong = sorted(e for e in set(held) if held.count(e) > 1 or not 0 <= e < table.num_experts)
            raise InvalidTable(f"layer {layer}: experts {missing} are in no shard, {wrong} in several or unknown")


def _replica_to_json(r: Replica) -> dict[str, Any]:
    e = r.endpoint
    return {
        "replica_id": r.replica_id,
        "shard_id": r.shard_id,
        "endpoint": {
            "host_id": e.host_id,
            "unix_name": e.unix_name,
            "tcp_host": e.tcp_host,
            "tcp_port": e.tcp_port,
            "tls": e.tls,
        },
        "state": r.state.value,
        "pid": r.pid,
        "node": r.node,
        "role": r.role.value,
    }


def _object(data: object, what: str, keys: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidTable(f"{what} is not an object")
    expected = set(keys.split())
    if set(data) != expected:
        unknown, missing = sorted(map(str, set(data) - expected)), sorted(expected - set(data))
        raise InvalidTable(f"{what}: unknown keys {unknown}, missing keys {missing}")
    return data


def _typed(value: object, kind: type[_T], what: str) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidTable(f"{what} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidTable(f"{what} must be true or false, not {type(value).__name__}")
    return value


def _member(value: object, kind: type[_E], what: str) -> _E:
    try:
        return kind(_typed(value, str, what))
    except ValueError:
        raise InvalidTable(f"unknown {what} {value!r}") from None


def _tuple_of(value: object, what: str, parse: Callable[[object], _T]) -> tuple[_T, ...]:
    return tuple(parse(item) for item in _typed(value, list, what))


def _shard_from_json(data: object) -> Shard:
    f = _object(data, "shard", "shard_id experts first_layer end_layer")
    return Shard(
        shard_id=_typed(f["shard_id"], int, "shard_id"),
        experts=_tuple_of(f["experts"], "experts", lambda e: _typed(e, int, "expert")),
        first_layer=_typed(f["first_layer"], int, "first_layer"),
        end_layer=_typed(f["end_layer"], int, "end_layer"),
    )


def _replica_from_json(data: object) -> Replica:
    f = _object(data, "replica", "replica_id shard_id endpoint state pid node role")
    e = _object(f["endpoint"], "endpoint", "host_id unix_name tcp_host tcp_port tls")
    return Replica(
        replica_id=_typed(f["replica_id"], str, "replica_id"),
        shard_id=_typed(f["shard_id"], int, "shard_id"),
        endpoint=Endpoint(
            host_id=_typed(e["host_id"], str, "host_id"),
            unix_name=_typed(e["unix_name"], str, "unix_name"),
            tcp_host=_typed(e["tcp_host"], str, "tcp_host"),
            tcp_port=_typed(e["tcp_port"], int, "tcp_port"),
            tls=_flag(e["tls"], "tls"),
        ),
        state=_member(f["state"], ReplicaState, "replica state"),
        pid=_typed(f["pid"], int, "pid"),
        node=_typed(f["node"], str, "node"),
        role=_member(f["role"], Role, "role"),
    )

"""Everything the expert router knows and decides, without Ray: workers, spares, engines, blame and events.

Pure but for its state: the clock is an argument (`now_s`, monotonic seconds), nothing waits and nothing is sent. The
routing table itself is Membership's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.accusations import USELESS, Accusations, condemns
from cluster.blame import Cause
from cluster.errors import ConfigError
from cluster.events import EventLog
from cluster.membership import Membership
from cluster.outages import Outages
from cluster.routing import Replica, ReplicaState, Role, RoutingTable
from cluster.scaling import ShardLoad

# A spare stays until a primary of its shard has been there for so long: not to leave with the next crash.
_RELEASE_AFTER_S = 2.0


class Answer(enum.Enum):
    """To a heartbeat."""

    OK = "ok"
    REGISTER = "register"
    """The router does not know the worker (any more)."""
    LEAVE = "leave"
    """Finish what was taken, and end."""
    RESTART = "restart"
    """Finish what was taken, and end; a successor is wanted from the same replica."""


class SpareState(enum.Enum):
    READY = "ready"
    ADOPTING = "adopting"
    SERVING = "serving"
    RELEASED = "released"


@dataclass
class Worker:
    """What is known of a registered worker beside its line in the table."""

    since_s: float
    memory_bytes: int = 0
    device: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)
    answer: Answer = Answer.OK


@dataclass
class Spare:
    """A process that has everything imported and holds no experts, or those of `shard_id`."""

    pid: int
    node: str
    heard_s: float
    state: SpareState = SpareState.READY
    shard_id: int | None = None


@dataclass
class Engine:
    """`fault` is what its integrity check number `checked` has found, empty for nothing; `load` is how busy it is."""

    pid: int
    node: str
    state: str
    since_s: float
    heard_s: float
    checked: int = 0
    fault: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """One application's. `wall_s` is the Unix time of `now_s`; `wanted` the replicas of each shard, `most` how many of
    them its nodes have room for, where that is limited."""

    def __init__(
        self,
        table: RoutingTable,
        lost_after_s: float,
        wanted: Mapping[int, int],
        now_s: float,
        wall_s: float,
        most: Mapping[int, int] | None = None,
    ) -> None:
        self._membership = Membership(table, lost_after_s)
        self._lost_after_s = lost_after_s
        self._start_s = now_s
        self._wanted = dict(wanted)
        self._most = dict(most or {})
        self._workers: dict[str, Worker] = {}
        self._spares: dict[str, Spare] = {}
        self._engines: dict[str, Engine] = {}
        self._accusations = Accusations()
        self.events = EventLog(wall_s - now_s)
        self.outages = Outages()
        self._served: set[int] = set()  # shards that had a worker once
        self._missing: set[int] = set()  # of those, the ones that have none now
        self._was_complete = False
        self._num_checks = 0
        self.note("router_started", "router", f"epoch {table.epoch}", now_s)

    # -- the table ------------------------------------------------------------------------------------------------

    @property
    def table(self) -> RoutingTable:
        return self._membership.table

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """Shards without an ONLINE replica."""
        return self._membership.missing_shards

    def news_for(self, known_epoch: int, now_s: float) -> RoutingTable | None:
        """The table for an engine that knows `known_epoch` (0: none), if it should have it now.

        The first table of an engine is complete. A router that has just been restarted keeps quiet until its workers
        have registered again, and never goes back behind an epoch that an engine has seen.
        """
        if known_epoch > self.table.epoch:
            self._membership.table = replace(self.table, epoch=known_epoch + 1)
        if self.table.epoch <= known_epoch:
            return None
        is_settled = known_epoch > 0 and now_s - self._start_s > self._lost_after_s
        return self.table if self._was_complete or is_settled else None

    # -- workers --------------------------------------------------------------------------------------------------

    def register(
        self, replica: Replica, model_fingerprint: str, memory_bytes: int, now_s: float, device: str = ""
    ) -> None:
        """A worker is ready to serve, on a device in words.

        Raises ConfigError when it holds another model, InvalidTable for its shard.
        """
        if model_fingerprint != self.table.model_fingerprint:
            self.note("worker_refused", replica.replica_id, f"holds model {model_fingerprint}", now_s)
        self._membership.register(replica, model_fingerprint, now_s)
        worker = self._workers.setdefault(replica.replica_id, Worker(now_s))
        worker.memory_bytes, worker.device = memory_bytes, device
        spare = self._spares.get(replica.replica_id)
        if spare is not None:
            spare.state = SpareState.SERVING
        self.note("worker_online", replica.replica_id, f"shard {replica.shard_id}, pid {replica.pid}", now_s)
        self._review(now_s)

    def heartbeat(self, replica_id: str, load: Mapping[str, Any], now_s: float) -> Answer:
        """A worker lives, and says how busy it is."""
        if not self._membership.heartbeat(replica_id, now_s):
            return Answer.REGISTER
        worker = self._workers[replica_id]
        worker.load = load
        return worker.answer

    def drain(self, replica_id: str, now_s: float) -> None:
        """The worker takes nothing new and is about to leave."""
        replica = self.replica(replica_id)
        if replica is not None and replica.state is ReplicaState.ONLINE:
            self._membership.drain(replica_id)
            self.note("worker_draining", replica_id, f"shard {replica.shard_id}", now_s)
            self._review(now_s)

    def retire(self, replica_id: str, now_s: float, answer: Answer = Answer.LEAVE) -> None:
        """Have a worker drain and end. Raises ConfigError for one that is not in the table."""
        if self.replica(replica_id) is None:
            raise ConfigError(f"there is no worker {replica_id}; `switchyard status` lists them")
        self.drain(replica_id, now_s)
        self._workers[replica_id].answer = answer

    def leave(self, replica_id: str, why: str, now_s: float) -> None:
        """A worker has ended, in order or not. Unknown ids are no error."""
        replica = self.replica(replica_id)
        if replica is None:
            return
        self._membership.leave(replica_id)
        self._workers.pop(replica_id, None)
        kind = "worker_lost" if replica.state is ReplicaState.ONLINE else "worker_left"
        self.note(kind, replica_id, f"shard {replica.shard_id}: {why}", now_s)
        self._review(now_s)

    def tick(self, now_s: float) -> None:
        """Whatever time alone brings about."""
        for replica_id in self._membership.expire(now_s):
            self.note("worker_lost", replica_id, f"no heartbeat for {self._lost_after_s:g} s", now_s)
        known = {replica.replica_id for replica in self.table.replicas}
        for name in [name for name in self._workers if name not in known]:
            del self._workers[name]
        for name, engine in list(self._engines.items()):
            if now_s - engine.heard_s > self._lost_after_s:
                self.engine_left(name, f"no heartbeat for {self._lost_after_s:g} s", now_s, is_lost=True)
        for name, spare in list(self._spares.items()):
            if now_s - spare.heard_s > self._lost_after_s:
                del self._spares[name]
                self.note("spare_lost", name, f"no heartbeat for {self._lost_after_s:g} s", now_s)
        self._review(now_s)

    # -- blame ----------------------------------------------------------------------------------------------------

    def accused(self, engine_id: str, replica_id: str, cause: Cause, now_s: float) -> None:
        """An engine accuses a replica. Condemned, it has to make room for a successor."""
        replica = self.replica(replica_id)
        if replica is None:
            return
        self.note("worker_suspected", replica_id, f"{cause.value}, says {engine_id}", now_s)
        count = self._accusations.add(engine_id, replica_id, cause, now_s)
        present = [r.replica_id for r in self.table.replicas if r.state is not ReplicaState.GONE]
        if self._accusations.is_engines_fault(engine_id, cause, present):
            self.note("engine_blamed", engine_id, f"accuses most workers of being {cause.value}", now_s)
            return
        if not condemns(cause, count) or replica.state is not ReplicaState.ONLINE:
            return
        if self._is_needed(replica, cause):
            self.note(
                "blame_ignored", replica_id, f"{cause.value}, but the last of its shard until others return", now_s
            )
        else:
            self.note("worker_blamed", replica_id, f"{cause.value}, {count} times: it has to go", now_s)
            self.retire(replica_id, now_s, Answer.RESTART)

    def _is_needed(self, replica: Replica, cause: Cause) -> bool:
        """It is better than nothing while other replicas of its shard are on their way."""
        online = sum(r.shard_id == replica.shard_id and r.state is ReplicaState.ONLINE for r in self.table.replicas)
        return cause not in USELESS and online == 1 and self._wanted[replica.shard_id] > 1

    # -- spares ---------------------------------------------------------------------------------------------------

    def spare_reports(self, spare_id: str, pid: int, node: str, shard_id: int | None, now_s: float) -> None:
        """A spare has everything but experts; or has adopted `shard_id`, and was forgotten here since."""
        if shard_id is None:
            state = SpareState.READY
            self.note("spare_ready", spare_id, f"pid {pid}", now_s)
        else:
            state = SpareState.SERVING if self._is_online(spare_id) else SpareState.ADOPTING
            self.note("spare_returned", spare_id, f"pid {pid}, shard {shard_id}", now_s)
        self._spares[spare_id] = Spare(pid, node, now_s, state, shard_id)
        self._review(now_s)

    def spare_left(self, spare_id: str, now_s: float) -> None:
        """A spare has ended, or has failed at what it was told to do."""
        if self._spares.pop(spare_id, None) is not None:
            self.leave(spare_id, "the spare has ended", now_s)

    def spare_order(self, spare_id: str, now_s: float) -> tuple[SpareState, int | None] | None:
        """What a spare is to do: (ADOPTING, shard) or (RELEASED, None). None: it is unknown and must report again."""
        spare = self._spares.get(spare_id)
        if spare is None:
            return None
        spare.heard_s = now_s
        return spare.state, spare.shard_id

    def _assign_spares(self, now_s: float) -> None:
        adopted = {spare.shard_id for spare in self._spares.values()}
        for shard_id in sorted(self._missing - adopted):
            free = [name for name, spare in self._spares.items() if spare.state is SpareState.READY]
            if not free:
                return
            spare = self._spares[free[0]]
            spare.state, spare.shard_id = SpareState.ADOPTING, shard_id
            self.note("spare_adopting", free[0], f"shard {shard_id}", now_s)

    def _release_spares(self, now_s: float) -> None:
        for name, spare in self._spares.items():
            if spare.state is SpareState.SERVING and self._has_primary(spare.shard_id, now_s):
                spare.state = SpareState.RELEASED
                self.note("spare_released", name, f"shard {spare.shard_id} has its worker back", now_s)
                self.drain(name, now_s)

    def _has_primary(self, shard_id: int | None, now_s: float) -> bool:
        return any(
            replica.shard_id == shard_id
            and replica.role is Role.PRIMARY
            and replica.state is ReplicaState.ONLINE
            and now_s - self._workers[replica.replica_id].since_s > _RELEASE_AFTER_S
            for replica in self.table.replicas
        )

    # -- engines --------------------------------------------------------------------------------------------------

    def engine_heartbeat(
        self, engine_id: str, pid: int, node: str, state: str, now_s: float, load: Mapping[str, Any] | None = None
    ) -> int:
        """An engine lives; `state` is starting, ready or stalled. Returns the number of the newest integrity check."""
        engine = self._engines.get(engine_id)
        if engine is None:
            self._engines[engine_id] = engine = Engine(pid, node, "", now_s, now_s)
        if state != engine.state:
            kind = {"stalled": "stall_began", "ready": "engine_ready"}.get(state, "engine_started")
            self.note("stall_ended" if engine.state == "stalled" else kind, engine_id, f"pid {pid}: {state}", now_s)
        engine.state, engine.heard_s, engine.load = state, now_s, load or {}
        return self._num_checks

    @property
    def engine_ids(self) -> tuple[str, ...]:
        """Every engine that lives."""
        return tuple(self._engines)

    def engine_checked(self, engine_id: str, number: int, fault: str) -> None:
        """An engine has done integrity check `number`."""
        if engine_id in self._engines:
            self._engines[engine_id].checked = number
            self._engines[engine_id].fault = fault

    def begin_check(self) -> int:
        """Ask every engine for an integrity check; returns its number."""
        self._num_checks += 1
        return self._num_checks

    def integrity(self, number: int) -> list[dict[str, Any]] | None:
        """{"subject", "ok", "text"} of every worker and engine, once every engine has done check `number`."""
        if any(engine.checked < number for engine in self._engines.values()):
            return None
        faults = {name: str(worker.load.get("fault", "")) for name, worker in self._workers.items()}
        faults |= {name: engine.fault for name, engine in self._engines.items()}
        return [{"subject": name, "ok": not fault, "text": fault} for name, fault in sorted(faults.items())]

    def engine_left(self, engine_id: str, why: str, now_s: float, *, is_lost: bool) -> None:
        """It has ended, as it was asked to or because it could not go on."""
        if self._engines.pop(engine_id, None) is not None:
            self.note("engine_lost" if is_lost else "engine_left", engine_id, why, now_s)

    # -- what people see ------------------------------------------------------------------------------------------

    def note(self, kind: str, subject: str, text: str, now_s: float) -> None:
        """Add an event."""
        self.events.add(kind, subject, text, now_s)

    def scale(self, shard_id: int, replicas: int, now_s: float, why: str = "asked for") -> None:
        """So many replicas are wanted of a shard. Raises ConfigError for an unknown shard or less than one."""
        if shard_id not in self._wanted:
            raise ConfigError(f"there is no shard {shard_id}; the shards are {sorted(self._wanted)}")
        if replicas < 1:
            raise ConfigError(f"a shard needs at least one replica, not {replicas}")
        if replicas > self._most.get(shard_id, replicas):
            raise ConfigError(
                f"the layout has room for {self._most[shard_id]} replicas of shard {shard_id}, not {replicas}: name "
                "more nodes for it"
            )
        if self._wanted[shard_id] != replicas:
            self.note("scaled", f"shard {shard_id}", f"{self._wanted[shard_id]} -> {replicas} replicas, {why}", now_s)
            self._wanted[shard_id] = replicas

    def shard_loads(self) -> dict[int, ShardLoad]:
        """How busy the primaries of each shard are that serve."""
        busy: dict[int, list[float]] = {shard_id: [] for shard_id in self._wanted}
        for replica in self.table.replicas:
            if replica.role is Role.PRIMARY and replica.state is ReplicaState.ONLINE:
                worker = self._workers.get(replica.replica_id)
                busy[replica.shard_id].append(float(worker.load.get("busy", 0.0)) if worker else 0.0)
        return {shard_id: ShardLoad(self._wanted[shard_id], len(each), sum(each)) for shard_id, each in busy.items()}

    @property
    def started_engines(self) -> tuple[str, ...]:
        """Those that have loaded everything and answer scrapes."""
        return tuple(name for name, engine in self._engines.items() if engine.state != "starting")

    @property
    def wanted(self) -> Mapping[int, int]:
        return self._wanted

    def what_happened(self) -> tuple[Any, ...]:
        """Something that differs whenever something has happened; loads and ages are nothing that happens."""
        engines = [(name, engine.state) for name, engine in self._engines.items()]
        spares = [(name, spare.state, spare.shard_id) for name, spare in self._spares.items()]
        return self.table.epoch, self.events.counts.total(), engines, spares, dict(self._wanted)

    def status(self, now_s: float) -> dict[str, Any]:
        """Plain JSON types, as `switchyard status --json` prints them (README.md, "Operate it")."""
        return {
            "epoch": self.table.epoch,
            "shards": [self._shard_status(shard.shard_id, now_s) for shard in self.table.shards],
            "spares": [
                {"id": name, "pid": spare.pid, "node": spare.node, "state": spare.state.value, "shard": spare.shard_id}
                for name, spare in sorted(self._spares.items())
            ],
            "engines": [
                {
                    "id": name,
                    "pid": e.pid,
                    "node": e.node,
                    "state": e.state,
                    "load": dict(e.load),
                    "age_s": now_s - e.since_s,
                }
                for name, e in sorted(self._engines.items())
            ],
            "missing_shards": list(self.missing_shards),
            "events": self.events.to_json(),
        }

    def _shard_status(self, shard_id: int, now_s: float) -> dict[str, Any]:
        shard = next(s for s in self.table.shards if s.shard_id == shard_id)
        replicas = sorted((r for r in self.table.replicas if r.shard_id == shard_id), key=lambda r: r.replica_id)
        return {
            "id": shard_id,
            "layers": [shard.first_layer, shard.end_layer],
            "experts": list(shard.experts),
            "num_experts": len(shard.experts),
            "wanted": self._wanted[shard_id],
            "most": self._most.get(shard_id),
            "replicas": [self._replica_status(replica, now_s) for replica in replicas],
        }

    def _replica_status(self, replica: Replica, now_s: float) -> dict[str, Any]:
        worker = self._workers.get(replica.replica_id, Worker(now_s))
        return {
            "id": replica.replica_id,
            "pid": replica.pid,
            "node": replica.node,
            "state": replica.state.value,
            "role": replica.role.value,
            "load": dict(worker.load),
            "memory_bytes": worker.memory_bytes,
            "device": worker.device,
            "age_s": now_s - worker.since_s,
        }

    # -- inside ---------------------------------------------------------------------------------------------------

    def replica(self, replica_id: str) -> Replica | None:
        return next((r for r in self.table.replicas if r.replica_id == replica_id), None)

    def _is_online(self, replica_id: str) -> bool:
        replica = self.replica(replica_id)
        return replica is not None and replica.state is ReplicaState.ONLINE

    def _review(self, now_s: float) -> None:
        """After a change: which shards are missing now, and what spares can do about it."""
        missing = set(self.missing_shards)
        self._served |= {shard.shard_id for shard in self.table.shards} - missing
        missing &= self._served
        for shard_id in sorted(missing - self._missing):
            self.note("shard_missing", f"shard {shard_id}", "no worker is left; calls wait for one", now_s)
            self.outages.begin(shard_id, now_s)
        for shard_id in sorted(self._missing - missing):
            self.note("shard_back", f"shard {shard_id}", "served again", now_s)
            self.outages.end(shard_id, now_s)
        self._missing = missing
        self._was_complete = self._was_complete or not self.missing_shards
        self._assign_spares(now_s)
        self._release_spares(now_s)

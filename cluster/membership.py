"""Who is in the routing table right now: the pure decisions behind the expert router.

Each change makes a new table with a larger epoch. The clock is an argument (`now_s`, monotonic seconds). A replica that
is silent for `lost_after_s` becomes GONE, and is forgotten FORGET_AFTER_S later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.errors import ConfigError
from cluster.routing import Replica, ReplicaState, RoutingTable

FORGET_AFTER_S = 60.0


class Membership:
    """The current routing table and when each of its replicas was last heard of."""

    def __init__(self, table: RoutingTable, lost_after_s: float) -> None:
        table.validate()
        self.table = table
        self._lost_after_s = lost_after_s
        self._heard_s: dict[str, float] = {}

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """Shards without an ONLINE replica; the application can serve when there are none."""
        online = {replica.shard_id for replica in self.table.replicas if replica.state is ReplicaState.ONLINE}
        return tuple(shard.shard_id for shard in self.table.shards if shard.shard_id not in online)

    def register(self, replica: Replica, model_fingerprint: str, now_s: float) -> None:
        """Add a replica that is ready, or one that the router had forgotten.

        Raises ConfigError when it holds another model than the table's, InvalidTable when its shard does not exist.
        """
        if model_fingerprint != self.table.model_fingerprint:
            raise ConfigError(
                f"worker {replica.replica_id} holds model {model_fingerprint}, this application serves "
                f"{self.table.model_fingerprint}: every node needs the same checkpoint at the same path"
            )
        table = self.table.with_replica(replica)
        table.validate()
        self.table = table
        self._heard_s[replica.replica_id] = now_s

    def heartbeat(self, replica_id: str, now_s: float) -> bool:
        """Note that the replica lives. False: it is unknown here or was given up, and must register again."""
        states = {replica.replica_id: replica.state for replica in self.table.replicas}
        if states.get(replica_id, ReplicaState.GONE) is ReplicaState.GONE:
            return False
        self._heard_s[replica_id] = now_s
        return True

    def drain(self, replica_id: str) -> None:
        """The replica takes nothing new but finishes what it has."""
        self._set_state([replica_id], ReplicaState.DRAINING)

    def leave(self, replica_id: str) -> None:
        """The replica has stopped of its own will. Unknown ids are no error."""
        if any(replica.replica_id == replica_id for replica in self.table.replicas):
            self.table = self.table.without(replica_id)
        self._heard_s.pop(replica_id, None)

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Mark silent replicas GONE, forget those long gone; returns the ids that became GONE now."""
        silent = {key for key, heard_s in self._heard_s.items() if now_s - heard_s > self._lost_after_s}
        lost = tuple(
            replica.replica_id
            for replica in self.table.replicas
            if replica.replica_id in silent and replica.state is not ReplicaState.GONE
        )
        self._set_state(lost, ReplicaState.GONE)
        for key in [key for key, heard_s in self._heard_s.items() if now_s - heard_s > FORGET_AFTER_S]:
            self.leave(key)
        return lost

    def _set_state(self, replica_ids: Iterable[str], state: ReplicaState) -> None:
        for replica in self.table.replicas:
            if replica.replica_id in replica_ids and replica.state is not state:
                self.table = self.table.with_replica(replace(replica, state=state))

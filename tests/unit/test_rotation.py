"""Changing the secret: whoever is late, an engine's proof is always accepted; and the former secret ends."""

import random
import socket
import time

import pytest
import torch

from cluster import auth
from cluster.dispatcher import Dispatcher
from cluster.errors import ConfigError, ConnectionLost
from cluster.fakes import ThreadWorker, ToyShape, eventually
from cluster.placement import partition
from cluster.rotation import Rotation, Secrets

SHAPE = ToyShape(hidden=8, max_tokens=4)
SHARD = partition(SHAPE.num_layers, SHAPE.num_experts, 1)[0]
NEXT = b"the next secret of the cluster"


def test_a_step_waits_for_everybody_it_needs():
    rotation = Rotation(Secrets(1, (SHAPE.secret,), SHAPE.secret))
    assert rotation.now.stage == "settled" and not rotation.advance(["w"], ["e"])
    rotation.begin(NEXT)
    with pytest.raises(ConfigError, match="already"):
        rotation.begin(NEXT)
    assert rotation.now.accepted == (SHAPE.secret, NEXT) and rotation.now.proven == SHAPE.secret
    rotation.holds("e", 2)
    rotation.holds("w", 1)
    assert not rotation.advance(["w"], ["e"])
    rotation.holds("w", 2)
    assert rotation.advance(["w"], ["e"]) and rotation.now.stage == "switching" and rotation.now.proven == NEXT
    rotation.holds("w", 3)
    assert not rotation.advance(["w"], ["e"])
    assert rotation.advance(["w"], [])  # the last engine that was late has died
    assert rotation.now == Secrets(4, (NEXT,), NEXT) and not rotation.is_everywhere(["w"], [])
    rotation.holds("w", 4)
    assert rotation.is_everywhere(["w"], [])
    assert Secrets.from_json(rotation.now.to_json()) == rotation.now
    assert len(Secrets.drawn().proven) == 32 and Secrets.drawn() != Secrets.drawn()


def test_in_any_order_of_events_every_proof_is_accepted_by_every_worker():
    for seed in range(200):
        rng = random.Random(seed)
        rotation = Rotation(Secrets(1, (SHAPE.secret,), SHAPE.secret))
        held = {f"{kind}{i}": rotation.now for kind in "we" for i in range(3)}
        workers, engines = [m for m in held if m[0] == "w"], [m for m in held if m[0] == "e"]
        num_rotations = 0
        for _ in range(200):
            member = rng.choice([*held])
            match rng.randrange(3):
                case 0:  # the long poll: what it holds is told, what is new is brought
                    rotation.holds(member, held[member].serial)
                    held[member] = rotation.now
                case 1:
                    rotation.advance(workers, engines)
                case 2 if rotation.now.stage == "settled" and rotation.is_everywhere(workers, engines):
                    rotation.begin(rng.randbytes(32))
                    num_rotations += 1
            assert all(held[e].proven in held[w].accepted for w in workers for e in engines), seed
        assert num_rotations > 0


def call(dispatcher: Dispatcher) -> None:
    x_TD, out_TD = torch.ones(2, 8), torch.empty(2, 8)
    dispatcher.finish(dispatcher.start(0, x_TD, torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int32)), out_TD)
    assert torch.equal(out_TD, torch.full((2, 8), 0.25))


@pytest.mark.parametrize("tcp", [False, True])
def test_calls_go_on_while_the_secret_changes_and_the_former_one_ends(tcp, tmp_path):
    worker = ThreadWorker(SHAPE, SHARD, tcp=tcp)
    file = tmp_path / "secret"
    file.write_bytes(SHAPE.secret)
    dispatcher = Dispatcher(
        engine_id="e", secret=file.read_bytes, hidden_size=SHAPE.hidden, top_k=SHAPE.top_k, dtype=SHAPE.dtype,
        max_tokens=SHAPE.max_tokens, expert_timeout_s=20.0,
    )  # fmt: skip
    replica = worker.replica("r")
    dispatcher.update(SHAPE.table(1, [SHARD], [replica]))
    call(dispatcher)
    worker.server.take_secrets([SHAPE.secret, NEXT])
    call(dispatcher)
    file.write_bytes(NEXT)
    worker.server.take_secrets([NEXT])
    call(dispatcher)  # the connection of the former secret is still good
    assert dispatcher.stats()["lost_links"] == 0
    dispatcher.update(SHAPE.table(2, [SHARD], []))
    assert eventually(lambda: worker.server.stats()["sessions"] == 0 or bool(dispatcher._links.absorb()))
    dispatcher.update(SHAPE.table(3, [SHARD], [replica]))
    call(dispatcher)  # a new connection, by the next secret
    assert worker.server.stats()["rejected"] == {} and worker.server.stats()["connections"] == 2
    with pytest.raises(ConnectionLost):
        prove(worker, SHAPE.secret)
    prove(worker, NEXT)
    with pytest.raises(ConfigError):
        worker.server.take_secrets([b"short"])
    dispatcher.close()
    worker.close()


def prove(worker: ThreadWorker, secret: bytes) -> None:
    with socket.create_connection((worker.server.endpoint.tcp_host, worker.server.endpoint.tcp_port), 5) as sock:
        auth.client_handshake(sock, secret, auth.EXPERT_CALLS, time.monotonic() + 5)

"""How processes are had from a node's nursery (model/nursery.py, where the protocol is), without an event loop."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.auth import peer
from cluster.errors import SwitchyardError

NURSERY = "SWITCHYARD_NURSERY"
"""The variable with the name of the node's nursery."""
TITLE = "switchyard: nursery "
"""What the title of a nursery's process begins with; its name follows."""
WORKER = "worker"
PROCESS = "process"
MODULE = "module"
_ANSWER_LIMIT_S = 180.0  # one that is importing answers when it has
_LONGEST_ANSWER_BYTES = 1 << 16


class NurseryFailed(SwitchyardError):
    """No process could be had on this node."""


class Fork(NamedTuple):
    """A process of the nursery's. Its status comes over the connection, and it is killed when that closes."""

    pid: int
    pidfd: int
    connection: socket.socket


def connect(name: str) -> socket.socket | None:
    """Connected to that nursery; None where there is none, or another user's."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_LIMIT_S)
    try:
        connection.connect("\0" + name)
    except OSError:
        connection.close()
        return None
    if peer(connection).user != os.getuid():
        connection.close()
        return None
    return connection


def ask(
    connection: socket.socket,
    work: str,
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    arguments: Sequence[str] = (),
) -> Fork:
    """A fork that does `work`, with its standard streams and whatever else the work wants as descriptors.

    `arguments` are a module's: its name first. Takes the connection over. Raises NurseryFailed.
    """
    try:
        request = {"work": work, "arguments": list(arguments), "environment": dict(environment)}
        message = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [message], descriptors)
        if sent < len(message):  # of a whole one the nursery may be done with the connection by now
            connection.sendall(message[sent:])
        answer, received, _, _ = socket.recv_fds(connection, _LONGEST_ANSWER_BYTES, 1)
        if not answer:
            raise NurseryFailed("the nursery refused to start a process; its own words are in its log")
        return Fork(int(json.loads(answer)["pid"]), received[0], connection)
    except (OSError, ValueError) as error:
        connection.close()
        raise NurseryFailed(f"the nursery did not answer: {error}") from error
    except BaseException:
        connection.close()
        raise


def forks_of(name: str, pid: int) -> list[int]:
    """The pids of processes that process `pid` has now from that nursery; none where there is no nursery."""
    connection = connect(name)
    if connection is None:
        return []
    with connection:
        try:
            connection.sendall(json.dumps({"forks_of": pid}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.recv(_LONGEST_ANSWER_BYTES))
        except (OSError, ValueError) as error:
            raise NurseryFailed(f"the nursery did not answer: {error}") from error
    return [int(each) for each in answer["forks"]]

"""TCP ports: whether one can be listened on, and finding free ones. Imports nothing heavy."""

import contextlib
import random
import socket

from cluster.errors import ConfigError

_LOOPBACK = "127.0.0.1"


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when the address cannot be listened on."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}. "
            "Stop what is using it, or choose another with --port (or --host)."
        ) from None


def free_ports(count: int) -> list[int]:
    """TCP ports that were free on loopback a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def free_block(size: int) -> tuple[int, int]:
    """First and last of `size` neighbouring ports on loopback that were free a moment ago, at a random place.

    Below the range from which Linux takes ports for outgoing connections. Raises ConfigError when there are none.
    """
    first_of_all, end = 20_000, 32_000
    starts = list(range(first_of_all, end, size))
    random.shuffle(starts)
    for first in starts:
        if all(map(_is_free, range(first, first + size))):
            return first, first + size - 1
    raise ConfigError(f"no {size} neighbouring free ports from {first_of_all} to {end} on this machine.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_LOOPBACK, port)) != 0

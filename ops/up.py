"""``switchyard up``: `switchyard serve` as the head of a cluster that other machines join."""

import argparse
import socket
from pathlib import Path

from cluster.addresses import is_loopback
from cluster.errors import ConfigError
from ops import serve
from ops.node_environment import RAY_PORT, check_token, default_token_file, make_token
from ops.ports import check_port

DESCRIPTION = """\
Start the head of a cluster on this machine and serve a model on all machines that join. Ctrl-C, or `switchyard down`,
stops it. Everything that `switchyard serve` takes is taken here.

  switchyard up --model /models/grok-2 --accept-license --workers 8
  switchyard up --address 10.0.0.1 --host 10.0.0.1
  switchyard join 10.0.0.1                             on the other machines, once they have the token's file

The token, which every machine of the cluster needs, is made in ~/.config/switchyard/token. The checkpoint must be at
the same path on every machine. HTTP listens on loopback unless --host says else, and then asks for API keys.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="this machine's address for the others (default: that of its default route)")
    parser.add_argument("--ray-port", type=int, default=RAY_PORT, help=f"port that they join at (default {RAY_PORT})")
    parser.add_argument(
        "--token-file", type=Path, default=default_token_file(), help=f"default: {default_token_file()}"
    )
    serve.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    address = arguments.address or own_address()
    if is_loopback(address):
        raise ConfigError(f"--address: no other machine can reach {address}. `switchyard serve` is for one machine.")
    check_port(address, arguments.ray_port)
    make_token(arguments.token_file)
    check_token(arguments.token_file)
    from ops.local_ray import Node

    node = Node(address, arguments.ray_port, arguments.token_file.absolute())
    print(f"others join with: switchyard join {address}:{node.port}    token: {node.token}", flush=True)
    return serve.serve_on(arguments, node)


def own_address(towards: str = "192.0.2.1") -> str:
    """This machine's address on the way to another (192.0.2.1 is nobody's: RFC 5737). Sends nothing.

    Raises ConfigError.
    """
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((towards, 9))
            return str(sock.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"this machine has no way to {towards}: {error.strerror}. Say --address.") from None

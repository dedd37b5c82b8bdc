"""``switchyard join``: make this machine part of a cluster, after checking what would make that fail."""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError
from cluster.inventory import NODE_LABEL
from deployments.machine import node_name
from deployments.nursery import keep_nursery, nursery_name
from ops import processes
from ops.beacon import KEY, Beacon, check_fit, own_beacon
from ops.node_environment import (
    ENGINE_PORTS,
    RAY_PORT,
    check_token,
    default_token_file,
    make_temporary,
    node_environment,
)
from ops.runs import joined_here
from ops.up import own_address

DESCRIPTION = """\
Give this machine to the cluster of a head that runs `switchyard up`. Ctrl-C, or `switchyard down`, takes it back.

  scp head:.config/switchyard/token ~/.config/switchyard/token
  switchyard join 10.0.0.1
  switchyard join 10.0.0.1:6379 --address 10.0.0.2

Needs the head's token, the same releases of Python and Switchyard, a clock that agrees, and a network on which the
machines of the cluster reach every port of each other.
"""

_CONNECT_LIMIT_S = 5.0
_HEAD_LIMIT_S = 30.0
_POLL_S = 0.5
_STOP_LIMIT_S = 10.0
_JOINED = "Ray runtime started"  # ray/scripts/scripts.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", metavar="ADDRESS", help=f"the head, with a port if it is not {RAY_PORT}")
    parser.add_argument(
        "--address", help="this machine's address for the others (default: that on the way to the head)"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        default=default_token_file(),
        help=f"the head's token (default: {default_token_file()})",
    )
    parser.add_argument("--num-gpus", type=int, metavar="N", help="GPUs to give (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Blocks until this machine leaves the cluster. 0: it was taken back, 1: Ray ended by itself."""
    host, port = parse_head(arguments.head)
    token = arguments.token_file.absolute()
    check_token(token)
    check_reachable(host, port)
    with _folder() as folder:
        nursery = nursery_name()
        os.environ.update(node_environment(token, folder / "tmp", ENGINE_PORTS, nursery))
        check_fit(_ask_head(f"{host}:{port}", token), own_beacon())
        address = arguments.address or own_address(host)
        print(f"joining {host}:{port} as {address}", flush=True)
        return _stay(
            ray_command(f"{host}:{port}", address, folder / "ray", arguments.num_gpus),
            folder / "ray.log",
            f"{host}:{port}",
            nursery,
        )


def parse_head(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPV6]:PORT. Raises ConfigError."""
    host, separator, port = text.rpartition(":")
    if not separator or ("]" not in host and ":" in host) or text.endswith("]"):
        host, port = text, str(RAY_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text} is not an address such as 10.0.0.1 or 10.0.0.1:{RAY_PORT}.")
    return host, int(port)


def check_reachable(host: str, port: int, limit_s: float = _CONNECT_LIMIT_S) -> None:
    """Raises ConfigError that tells a head that does not run from a firewall in between."""
    try:
        socket.create_connection((host, port), limit_s).close()
    except ConnectionRefusedError:
        text = f"{host} refuses connections to port {port}."
        raise ConfigError(f"{text} Does `switchyard up` run there, with that --address and --ray-port?") from None
    except TimeoutError:
        text = f"{host} does not answer on port {port} within {limit_s:g} s."
        raise ConfigError(f"{text} A firewall in between? The machines need every port of each other.") from None
    except OSError as error:
        raise ConfigError(f"cannot reach {host} port {port}: {error.strerror or error}.") from None


def _ask_head(address: str, token: Path) -> Beacon:
    """What the head says of itself, as soon as it says something: its Ray answers seconds before it is ready."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    end_s = time.monotonic() + _HEAD_LIMIT_S
    try:
        client = GcsClient(address=address)
        while (data := client.internal_kv_get(KEY, None, timeout=_CONNECT_LIMIT_S)) is None:
            if time.monotonic() > end_s:
                break
            time.sleep(_POLL_S)
        return Beacon.from_json(data)
    except AuthenticationError:
        raise ConfigError(f"the head does not take the token in {token}. Copy the file from the head again.") from None
    except RpcError as error:
        raise ConfigError(f"{address} does not answer as Ray of this release does: {error}") from None


def ray_command(head: str, address: str, folder: Path, num_gpus: int | None) -> list[str]:
    """The command that starts Ray on this machine, its files in `folder`, and stays for as long as that runs."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--address={head}",
        f"--node-ip-address={address}",
        f"--labels={NODE_LABEL}={node_name()}",  # by which a layout pins to it
    ]
    command += ["--block", "--disable-usage-stats", f"--temp-dir={folder}"]
    return [*command, *([f"--num-gpus={num_gpus}"] if num_gpus is not None else [])]


def _stay(command: list[str], log: Path, head: str, nursery: str) -> int:
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `switchyard down`: as Ctrl-C
    is_stopping = threading.Event()
    keep_nursery(nursery, log.with_name("nursery.log"), is_stopping)
    with log.open("wb") as output:
        ray = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        with joined_here(head):
            if _has_joined(ray, log):
                print("joined. Ctrl-C takes this machine back.", flush=True)
            status = ray.wait()
        print(f"switchyard: Ray has ended with status {status}: {_last_line(log)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("leaving", flush=True)
        return 0
    finally:
        is_stopping.set()
        processes.end_descendants(_STOP_LIMIT_S)


def _has_joined(ray: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until Ray says that it runs, or ends."""
    while ray.poll() is None:
        if _JOINED in log.read_text(encoding="utf-8", errors="replace"):
            return True
        time.sleep(_POLL_S)
    return False


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="switchyard-join-", dir="/tmp"))
    make_temporary(folder / "tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

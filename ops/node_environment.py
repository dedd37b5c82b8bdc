"""What every process of a node's Ray inherits, on a single machine, on the head and on machines that join; Ray 2.60."""

import getpass
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import ConfigError
from deployments.environment import cache_folder
from deployments.nursery import NURSERY, PYTHON

RAY_PORT = 6379
# Where engines listen for haproxy, on every machine of a cluster. Below the range from which Linux takes ports for
# outgoing connections.
ENGINE_PORTS = (30_000, 30_046)
_TOKEN_BYTES = 32


def default_token_file() -> Path:
    """$XDG_CONFIG_HOME/switchyard/token, or the same below ~/.config."""
    configured = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "switchyard" / "token"


def make_token(path: Path) -> None:
    """Write a new token, mode 0600, unless there is one. Raises ConfigError where that cannot be."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
    except FileExistsError:
        check_token(path)
    except OSError as error:
        raise ConfigError(f"cannot write the cluster's token to {path}: {error.strerror}.") from None


def check_token(path: Path) -> None:
    """Raises ConfigError for a token that is missing, readable by others, or none."""
    try:
        mode, data = stat.S_IMODE(path.stat().st_mode), path.read_bytes().strip()
    except OSError as error:
        why = f"cannot read the cluster's token in {path}: {error.strerror}."
        raise ConfigError(f"{why} `switchyard up` makes it on the head; copy it here, mode 0600.") from None
    if mode & 0o077:
        raise ConfigError(f"others can read the cluster's token. Run: chmod 600 {path}")
    if len(data) < _TOKEN_BYTES or not data.isalnum():
        raise ConfigError(f"{path} holds no token. Copy the head's file as it is.")


def make_temporary(folder: Path) -> None:
    """A private folder for the temporary files of one Ray, in which PyTorch finds its precompiled C++ headers again.

    Without them the first compilation of every start takes a quarter of a minute; torch/_inductor/codecache.py keeps
    them in the folder of temporary files and nowhere else.
    """
    folder.mkdir(mode=0o700)
    kept = cache_folder() / "torch"
    kept.mkdir(parents=True, exist_ok=True)
    (folder / f"torchinductor_{getpass.getuser()}").symlink_to(kept)


def node_environment(token: Path, temporary: Path, engine_ports: tuple[int, int], nursery: str) -> Mapping[str, str]:
    """Variables for every node of the cluster; `temporary` is made by make_temporary(), `nursery` is its name."""
    return {
        NURSERY: nursery,
        PYTHON: sys.executable,
        "TMPDIR": str(temporary),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default of 15 would let any other program on the machine starve the kernels.
        "RAY_worker_niceness": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        # The processes of an engine that was killed go with it.
        "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "1",
        # Serve's controller looks after its replicas ten times a second by default, on a core that kernels need.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
        # Calls through a Serve handle go from process to process. As Ray's tasks each of them would end with an
        # acknowledgement of its caller's, for which the callee waits: for half a minute if the caller was cut off.
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(engine_ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(engine_ports[1]),
        # One event loop per engine replica: a streamed token crosses no thread on its way out.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }

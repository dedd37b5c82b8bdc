"""One long-lived local Ray for the tests, on which applications are deployed one after another.

It lives in a process of its own (python -m tests.serving PORT), because Ray reads its settings when it is imported, and
because its end must not depend on the test process. JSON lines: an order on stdin, one answer on stdout.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ops.ports import free_ports
from tests.golden import GOLDENS

ROOT = Path(__file__).resolve().parents[1]
# Two shards of two replicas each, in the precision in which tokens are exactly those of any other run.
REPLICATED: Mapping[str, Any] = {
    "model": str(GOLDENS / "mixtral-tiny"),
    "dtype": "float32",
    "workers": 2,
    "replicas": 2,
    "engine": {"kv_cache_gib": 0.25, "enforce_eager": True, "vllm": {"enable_prefix_caching": False}},
    "worker": {"fault_injection": True},
}
CONSOLE_TOKEN = "0" * 64
# Nobody listens there, and nothing is sent there, until a test is about tracing.
COLLECTOR_PORT = free_ports(1)[0]
# Two engines that share two workers.
TWO_ENGINES: Mapping[str, Any] = {
    "model": str(GOLDENS / "mixtral-tiny"),
    "dtype": "float32",
    "workers": 2,
    "engines": 2,
    "engine": {"kv_cache_gib": 0.25},
    "tracing": {"endpoint": f"http://127.0.0.1:{COLLECTOR_PORT}/v1/traces", "protocol": "http", "sample": 0},
}


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    """Return when `condition` holds; fail, naming `what`, when it does not in time."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s} s for: {what}"
        time.sleep(0.1)


class Serving:
    """The tests' end. `url` is the HTTP API's base; deploy() replaces what is deployed."""

    def __init__(self, log: Path) -> None:
        (port,) = free_ports(1)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.model = ""
        self._deployed: Mapping[str, Any] | None = None
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            cwd=ROOT,
            text=True,
        )

    def deploy(self, args: Mapping[str, Any]) -> None:
        """Serve `args` (the args of ray-config.yaml), unless they are being served already. Returns when ready."""
        if self._deployed != args:
            self._deployed = None
            self.model = self.ask("deploy", args=dict(args))
            self._deployed = dict(args)

    def ask(self, order: str, **details: Any) -> Any:
        """Send one order; raises RuntimeError with the other end's words when it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"order": order, **details}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the serving process ended:\n{self._log.read_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    @property
    def process_id(self) -> int:
        """Of the process whose descendants are all of Ray, Serve and vLLM."""
        return self._process.pid

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=60)


def main(port: int) -> None:
    """The other end: owns the Ray until stdin ends."""
    from ops.local_ray import LocalRay

    ray = LocalRay()
    answers = sys.stdout
    sys.stdout = sys.stderr
    try:
        ray.start(http_host="127.0.0.1", http_port=port, http_options={}, proxy_location="HeadOnly")
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = {"result": _ORDERS[order.pop("order")](port, **order)}
            # Whatever went wrong is the test's to report.
            except Exception as error:
                answer = {"error": f"{error} (logs in {ray.logs})"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        ray.stop()


def _deploy(port: int, args: dict[str, Any]) -> str:
    from ray import serve

    from deployments.plan import make_plan
    from ops.serve_config import ServeConfig
    from ops.startup import Startup

    config = ServeConfig(port=port, args=args)
    plan = make_plan(args)
    if config.app_name in serve.status().applications:
        serve.delete(config.app_name)
    startup = Startup(config, plan, lambda text: print(text, file=sys.stderr, flush=True))
    startup.deploy()
    startup.wait_until_ready(threading.Event())
    return str(plan.settings.name)


def _status(port: int) -> Any:
    return _call("expert-router", "status")


def _control(port: int, method: str, **arguments: Any) -> Any:
    from deployments.control import Control

    return getattr(Control("switchyard"), method)(**arguments)


def _console(port: int, args: dict[str, Any]) -> str:
    """A link to the console of what is deployed."""
    from deployments.control import Control
    from deployments.plan import make_plan
    from ops.about import about
    from ops.api_server import ApiServer

    facts = about(make_plan(args), f"http://127.0.0.1:{port}")
    audit_log = Path(_logs(port)) / "audit.log"
    return ApiServer(Control("switchyard"), CONSOLE_TOKEN, "127.0.0.1", 0, audit_log, facts).console_link()


def _worker_stats(port: int, shard_id: int) -> Any:
    return _call(f"experts-{shard_id}", "stats")


def _call(deployment: str, method: str) -> Any:
    from ray import serve

    handle = serve.get_deployment_handle(deployment, "switchyard")
    return getattr(handle, method).remote().result(timeout_s=10)


def _logs(port: int) -> str:
    """The folder into which everything of this Ray writes its logs."""
    import ray

    return str(ray._private.worker._global_node.get_logs_dir_path())


def _ray_metrics_port(port: int) -> int:
    """Where the node's metrics agent listens: what Ray's service discovery tells Prometheus."""
    import ray

    return int(ray.nodes()[0]["MetricsExportPort"])


def _engine_ports(port: int) -> list[int]:
    """The replicas' own ports, behind haproxy."""
    import ray
    from ray.serve.context import _get_global_client

    groups = ray.get(
        _get_global_client()._controller.get_target_groups.remote(app_name="switchyard", from_proxy_manager=True)
    )
    return sorted(target.port for group in groups for target in group.targets)


_ORDERS = {
    "deploy": _deploy,
    "status": _status,
    "control": _control,
    "console": _console,
    "worker_stats": _worker_stats,
    "engine_ports": _engine_ports,
    "logs": _logs,
    "ray_metrics_port": _ray_metrics_port,
}

if __name__ == "__main__":
    main(int(sys.argv[1]))

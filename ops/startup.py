"""From deploying to ready: what is said meanwhile, when to give up, and what is noticed afterwards."""

import http.client
import re
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.layout import num_workers
from deployments.control import router_handle
from ops.serve_config import ServeConfig

_POLL_S = 0.5
_SAY_AT_LEAST_EVERY_S = 10.0
_WATCH_EVERY_S = 5.0
_STATUS_TIMEOUT_S = 5.0
_ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception|Failed)(?:\([^)]*\))?: (.+)$")


class StartupFailed(RuntimeError):
    """The application will not come up; the message is for people."""


class Startup:
    """One deployment of the application on the Serve instance of this process."""

    def __init__(self, config: ServeConfig, plan: Any, say: Callable[[str], None]) -> None:
        self._config = config
        self._plan = plan
        self._say = say
        self._said = ""
        self._said_s = 0.0

    def deploy(self) -> None:
        """Hand the application to Serve; returns at once."""
        from ray import serve
        from ray.serve import RunTarget

        from deployments.app import build_app

        target = RunTarget(
            target=build_app(self._config.args),
            name=self._config.app_name,
            route_prefix=self._config.route_prefix,
            external_scaler_enabled=True,  # for `switchyard scale` and `drain`
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def wait_until_ready(self, stop: threading.Event) -> bool:
        """False when `stop` was set first. Raises StartupFailed when a deployment cannot start or time is up."""
        deadline_s = time.monotonic() + self._plan.settings.start_timeout_s
        while not stop.wait(_POLL_S):
            found = self._overview()
            failure = failure_message(found)
            if failure:
                raise StartupFailed(failure)
            if found.app_status.status.value == "RUNNING" and self._answers():
                return True
            if time.monotonic() > deadline_s:
                raise StartupFailed(f"not ready after {self._plan.settings.start_timeout_s:.0f} s (start_timeout_s)")
            self._progress(self._summary())
        return False

    def watch(self, stop: threading.Event) -> None:
        """Until `stop` is set, say when the application becomes unhealthy and when it recovers."""
        last = "RUNNING"
        while not stop.wait(_WATCH_EVERY_S):
            status = self._overview().app_status.status.value
            if status != last:
                self._say(f"the application is {status}")
                last = status

    def _overview(self) -> Any:
        from deployments.targets import overview

        return overview(self._config.app_name)

    def _summary(self) -> str:
        """What workers and engines report, in one line."""
        if self._plan.spec is None:
            return "engine: starting vLLM"
        progress = self._reported()
        settings = self._plan.settings
        workers = [stage for source, stage in progress.items() if source.startswith("experts-")]
        engines = [stage for source, stage in progress.items() if source.startswith("engine-")]
        return (
            f"workers: {count_stages(workers, num_workers(settings))}; "
            f"engines: {count_stages(engines, settings.engines)}"
        )

    def _reported(self) -> dict[str, str]:
        # The router is the first to come up; before it there is nothing to report.
        try:
            status = router_handle(self._config.app_name).status.remote().result(timeout_s=_STATUS_TIMEOUT_S)
        except Exception:
            return {}
        return dict(status["progress"])

    def _progress(self, text: str) -> None:
        now_s = time.monotonic()
        if text != self._said or now_s - self._said_s > _SAY_AT_LEAST_EVERY_S:
            self._say(text)
            self._said, self._said_s = text, now_s

    def _answers(self) -> bool:
        """Whether a request gets through the proxy to an engine; true where there is no proxy to ask."""
        if self._config.proxy_location == "Disabled":
            return True
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        port, limit_s = self._config.port, _STATUS_TIMEOUT_S
        connection = http.client.HTTPConnection(host, port, timeout=limit_s)
        if self._config.tls_cert is not None:
            # It is our own certificate, and its name need not be this address.
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(host, port, timeout=limit_s, context=context)
        try:
            connection.request("GET", self._config.route_prefix.rstrip("/") + "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def count_stages(stages: list[str], expected: int) -> str:
    """For example "1 of 2 ready, 1 reading 4 of 8 experts per layer"."""
    ready = stages.count("ready")
    others = sorted({stage for stage in stages if stage != "ready"})
    waiting = [] if stages else ["starting"]
    return ", ".join([f"{ready} of {expected} ready", *others, *waiting])


def failure_message(found: Any) -> str | None:
    """Why a deployment of an overview() failed, in its own last words; None while there is hope."""
    for deployment in found.deployment_statuses:
        if deployment.status.value in ("DEPLOY_FAILED", "UNHEALTHY") or "failed to start" in deployment.message:
            return f"{deployment.name} did not start: {last_words(deployment.message)}"
    if found.app_status.status.value == "DEPLOY_FAILED":
        return f"the application did not start: {last_words(found.app_status.message)}"
    return None


def last_words(message: str) -> str:
    """The exception's own line out of a remote traceback, without the traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
    return found[-1] if found else (lines[-1] if lines else "no reason was given")

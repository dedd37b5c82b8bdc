"""``switchyard serve``: check, start a local Ray, deploy, say what is going on, wait, and leave nothing behind."""

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.layout import num_workers
from ops.exposure import checked_pem, with_checked_exposure
from ops.ports import check_port
from ops.serve_config import ServeConfig, read_serve_config
from ops.startup import Startup

if TYPE_CHECKING:
    from ops.local_ray import Node

DESCRIPTION = """\
Start a model on this machine and serve it over HTTP, with OpenAI's API. Ctrl-C stops everything.

  switchyard serve                                     the demo model on 127.0.0.1:8000
  switchyard serve --model /models/mixtral --workers 4
  switchyard serve --model /models/grok-2 --accept-license --dtype bfloat16 --engines 2 --replicas 2
  switchyard serve --config ray-config.yaml --port 9000
  switchyard keys add alice && switchyard serve --host 0.0.0.0

Settings come from the config file, if there is one, and from these options, which win. ray-config.yaml in the
repository explains every setting.
"""

DEFAULT_CONFIG = Path("ray-config.yaml")
FAILED = 1

_SETTINGS = ("model", "workers", "replicas", "engines", "dtype", "api_keys")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default: ray-config.yaml, if it is here)"
    )
    parser.add_argument("--model", metavar="PATH", help='folder of the checkpoint; "demo" is the built-in model')
    parser.add_argument("--workers", type=int, metavar="N", help="expert shards (default 2)")
    parser.add_argument("--replicas", type=int, metavar="R", help="copies of each shard (default 1)")
    parser.add_argument("--engines", type=int, metavar="N", help="vLLM engines that share the workers (default 1)")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), help="precision (default auto: as the checkpoint)"
    )
    parser.add_argument(
        "--accept-license",
        action="store_true",
        help="accept the terms of weights that ask for it, such as Grok-2's (`switchyard license MODEL` prints them)",
    )
    parser.add_argument(
        "--host", help="address to listen on (default 127.0.0.1: this machine only; others ask for API keys)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default 8000)")
    parser.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate (PEM, with its chain)")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's private key (PEM, without a password)")
    parser.add_argument(
        "--api-keys", metavar="FILE", help="ask for the keys of this file (`switchyard keys` makes them)"
    )
    parser.add_argument(
        "--allow-anonymous", action="store_true", help="ask for no keys even where other machines can reach HTTP"
    )
    parser.add_argument(
        "--ops-port", type=int, default=0, help="port of the console and the ops API, this machine only (default: any)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Blocks until a signal ends it (status 0) or the application cannot start (status 1)."""
    return serve_on(arguments, None)


def serve_on(arguments: argparse.Namespace, node: "Node | None") -> int:
    """run(), on a machine of its own (None) or as the head of a cluster."""
    config = configure(arguments)
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:4.0f} s] {text}", file=sys.__stdout__, flush=True)

    stop = threading.Event()
    install_handlers = _stop_on_signals(stop, say)
    say("checking the settings")
    # Cheap, and before the seconds that the imports of the rest take.
    config = with_checked_exposure(config)
    checked_pem(config)
    check_port(config.host, config.port)
    return _serve(config, node, arguments.ops_port, stop, say, install_handlers)


def configure(arguments: argparse.Namespace) -> ServeConfig:
    """The file's settings with the command line's on top. Raises ConfigError."""
    path = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    config = read_serve_config(path) if path is not None else ServeConfig()
    given = {key: getattr(arguments, key) for key in _SETTINGS if getattr(arguments, key) is not None}
    if arguments.accept_license:
        given["license"] = "accepted"
    if arguments.allow_anonymous:
        given["allow_anonymous"] = True
    config = dataclasses.replace(config, args={**config.args, **given})
    if arguments.host is not None:
        config = dataclasses.replace(config, host=arguments.host)
    for option in ("tls_cert", "tls_key"):
        if getattr(arguments, option) is not None:
            config = dataclasses.replace(config, **{option: getattr(arguments, option)})
    if arguments.port is not None:
        if not 0 < arguments.port < 65536:
            raise ConfigError(f"--port: must be from 1 to 65535, not {arguments.port}.")
        config = dataclasses.replace(config, port=arguments.port)
    return config


def _serve(
    config: ServeConfig,
    node: "Node | None",
    ops_port: int,
    stop: threading.Event,
    say: Callable[[str], None],
    install_handlers: Callable[[], None],
) -> int:
    from ops.local_ray import LocalRay

    plan = _checked_plan(config, is_alone=node is None)
    ray = LocalRay(node)
    try:
        say(f"starting Ray for {describe(plan)}")
        ray.start(
            http_host=config.host,
            http_port=config.port,
            http_options=config.http_options,
            proxy_location=config.proxy_location,
            pem=checked_pem(config),
        )
        install_handlers()  # Ray has put its own in their place
        startup = Startup(config, plan, say)
        startup.deploy()
        if startup.wait_until_ready(stop):
            with operable(config, plan, ops_port, ray.logs) as console:
                say(ready_message(config, plan, ray.logs, console))
                startup.watch(stop)
        say("stopping")
    except ConfigError:
        raise
    # The top of the command: whatever went wrong, people get a paragraph and the logs, not a traceback.
    except Exception as error:
        if ray.logs.is_dir():
            (ray.logs / "switchyard.err").write_text(traceback.format_exc(), encoding="utf-8")
        print(f"switchyard: {error}\nThe logs are in {ray.logs}", file=sys.stderr, flush=True)
        return FAILED
    finally:
        ray.stop()
    say(f"stopped; logs are kept in {ray.logs}")
    return 0


@contextlib.contextmanager
def operable(config: ServeConfig, plan: Any, ops_port: int, logs: Path) -> Iterator[str | None]:
    """Meanwhile `switchyard status` and its like find this cluster and can ask it for things; gives a console link."""
    if plan.spec is None:  # no experts, nothing to operate
        yield None
        return
    from deployments.control import Control
    from ops.about import about
    from ops.api_server import ApiServer
    from ops.runs import announced, this_process

    token = secrets.token_hex(32)
    url, audit_log = base_url(config), logs / "switchyard-audit.log"
    server = ApiServer(Control(config.app_name), token, "127.0.0.1", ops_port, audit_log, about(plan, url))
    run = this_process(model=plan.settings.name, http=url, ops=server.address, token=token, logs=str(logs))
    try:
        with announced(run):
            yield server.console_link()
    finally:
        server.close()


def base_url(config: ServeConfig) -> str:
    """Where the HTTP API can be reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"{'https' if config.tls_cert else 'http'}://{host}:{config.port}"


def _checked_plan(config: ServeConfig, is_alone: bool) -> Any:
    """Everything that can be known to fail, before anything is started. Raises ConfigError."""
    from deployments.machine import node_name
    from deployments.plan import make_plan
    from ops.checks import check_compiler, check_gpus, check_memory, check_nodes

    plan = make_plan(config.args)
    check_compiler(plan)
    if is_alone:  # else other machines have memory too, and other names
        check_nodes(plan, node_name())
        check_memory(plan)
        check_gpus(plan)
    return plan


def describe(plan: Any) -> str:
    """One line: what is about to run."""
    settings, spec = plan.settings, plan.spec
    engines = f"{settings.engines} engine{'s' * (settings.engines > 1)}"
    if spec is None:
        return f"{settings.name}: a dense model, {engines}, no expert workers"
    count = num_workers(settings)
    workers = f"{count} expert worker{'s' * (count > 1)}"
    return (
        f"{settings.name}: {spec.num_experts} experts in {spec.num_layers} layers, top {spec.top_k}; "
        f"{engines}, {workers}"
    )


def ready_message(config: ServeConfig, plan: Any, logs: Path, console: str | None) -> str:
    """URL, a line to try, where the console and the logs are."""
    url = base_url(config)
    body = {"model": plan.settings.name, "prompt": example_prompt(plan), "max_tokens": 40}
    key = " -H 'Authorization: Bearer KEY'" if plan.settings.api_keys else ""
    headers = f"-H 'Content-Type: application/json'{key}"
    console_line = f"  console: {console}\n" if console else ""
    return (
        f"ready: {url}/v1 serves {plan.settings.name}\n\n"
        f"  curl {url}/v1/completions {headers} \\\n    -d '{json.dumps(body)}'\n\n"
        f"{console_line}  logs: {logs}\n  `switchyard status` shows the workers. Ctrl-C stops everything.\n"
    )


def example_prompt(plan: Any) -> str | list[int]:
    """Token ids where the checkpoint has no tokenizer."""
    from deployments.models import has_tokenizer

    return "Once upon a time" if has_tokenizer(plan.settings.model) else [1, 2, 3]


def _stop_on_signals(stop: threading.Event, say: Callable[[str], None]) -> Callable[[], None]:
    """The first signal asks for an orderly stop, the third gives up on it. Returns a function that says so again."""
    seen = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        stop.set()
        if len(seen) == 2:
            say("still stopping; once more kills everything at once")
        if len(seen) > 2:
            from ops import processes

            processes.end_descendants(0.0)
            os._exit(FAILED)

    def install() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    install()
    return install

"""`switchyard bench observe`: what observing costs, as throughput with everything on divided by throughput with it off.

Two clusters of the same model run side by side, one with metrics and spans of a hundredth of its requests, and one with
neither, and take turns in an order that alternates. A turn is as long as `switchyard observe` takes from scrape to
scrape; in each of its turns the first cluster is scraped once, and somebody watches its console. Ratios are taken
within a pair of turns, so that load from outside moves both. The first pairs are not counted: caches fill, and Serve
comes to rest.
"""

import argparse
import contextlib
import http.server
import json
import math
import os
import signal
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import parse_settings
from cluster.errors import ConfigError
from ops.api_client import ApiClient
from ops.bench import sides
from ops.bench.compare import WARM_UP_TOKENS, say
from ops.bench.load import Workload, run_level
from ops.bench.servers import Server, run_of
from ops.observe.prometheus import SCRAPE_EVERY_S
from ops.runs import Run

SIDES = ("on", "off")
_START_LIMIT_S = 600.0
_SCRAPE_LIMIT_S = 10.0
_UNCOUNTED_PAIRS = 3


@dataclass(frozen=True)
class Turn:
    """One side's turn: tokens per second, CPU milliseconds that its processes took for a token, and how long it was."""

    throughput: float
    cpu_ms_per_token: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench observe`."""
    parser.add_argument("--model", default="demo", metavar="DIR", help="checkpoint (default: the demo model)")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="turns of each side (default 10)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="requests at the same time (default 8)")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help="tokens per answer (default 64)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Raises ConfigError for options below 1, ServerFailed, LoadError."""
    from deployments.models import resolve_model

    if min(arguments.pairs, arguments.streams) < 1 or arguments.output_tokens < 2:
        raise ConfigError("--pairs and --streams: must be 1 or more, and --output-tokens 2 or more.")
    model = resolve_model(arguments.model)
    workload = Workload(sides.vocabulary_size(model), output_tokens=arguments.output_tokens)
    with contextlib.ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
        collector = stack.enter_context(_collector())
        servers = {
            side: stack.enter_context(_started(side, str(model), arguments.streams, logs, collector)) for side in SIDES
        }
        for server in servers.values():
            warm_up = replace(workload, output_tokens=WARM_UP_TOKENS)
            run_level(server.base_url, server.model, warm_up, arguments.streams, arguments.streams)
        answers = arguments.streams
        # Serve's controller and the caches are not yet at rest: these pairs only say how long a turn is.
        for number in range(_UNCOUNTED_PAIRS):
            turns = _pair("not counted", number, servers, workload, arguments.streams, answers)
            answers = arguments.streams * math.ceil(answers / arguments.streams * SCRAPE_EVERY_S / turns["off"].seconds)
        pairs = [
            _pair(f"pair {number}", number, servers, workload, arguments.streams, answers)
            for number in range(1, arguments.pairs + 1)
        ]
    result = summary(pairs)
    print(json.dumps(result) if arguments.json else "\n".join(table(result)))
    return 0


@contextlib.contextmanager
def _started(side: str, model: str, streams: int, logs: Path, collector: str) -> Iterator[Server]:
    from ops.ports import free_ports

    args = sides.bench_args(model, num_workers=1, dtype="auto", streams=streams, tokens=128)
    tracing = {"endpoint": collector if side == "on" else None, "protocol": "http"}
    settings = parse_settings({**args, "metrics": side == "on", "tracing": tracing})
    config = logs / f"{side}.yaml"
    sides.write_config(config, settings)
    (port,) = free_ports(1)
    environment, url, log = (
        sides.switchyard_environment(os.environ),
        f"http://{sides.HOST}:{port}",
        logs / f"{side}.log",
    )
    say(f"{side}: starting (log: {log})")
    command = sides.switchyard_command(config, port)
    with Server(side, command, environment, url, settings.name, log, signal.SIGINT) as server:
        server.wait_ready(_START_LIMIT_S, lambda elapsed_s: say(f"{side}: still starting, {elapsed_s:.0f} s"))
        yield server


def _pair(
    name: str, number: int, servers: Mapping[str, Server], workload: Workload, streams: int, answers: int
) -> dict[str, Turn]:
    order = SIDES if number % 2 == 0 else SIDES[::-1]
    mine = replace(workload, seed=number)
    turns = {side: _turn(servers[side], mine, streams, answers, side == "on") for side in order}
    on, off = turns["on"], turns["off"]
    ratio = on.throughput / off.throughput
    say(f"{name}: on {on.throughput:.1f}, off {off.throughput:.1f} tokens/s: {ratio:.3f} ({off.seconds:.0f} s)")
    return turns


def _turn(server: Server, workload: Workload, streams: int, answers: int, is_observed: bool) -> Turn:
    with _observed(server) if is_observed else contextlib.nullcontext():
        cpu_s = server.cpu_s()
        level = run_level(server.base_url, server.model, workload, streams, answers)
        cpu_s = server.cpu_s() - cpu_s
    num_tokens = sum(trace.num_tokens for trace in level.traces)
    return Turn(num_tokens / level.duration_s, cpu_s / num_tokens * 1000, level.duration_s)


@contextlib.contextmanager
def _observed(server: Server) -> Iterator[None]:
    """Meanwhile Prometheus scrapes it, and a console is open."""
    with _scraped(server.base_url + "/metrics"), _watched(run_of(server)):
        yield


def _watched(run: Run) -> contextlib.AbstractContextManager[None]:
    """Meanwhile somebody looks at the console, which is told whatever changes."""

    def watch(done: threading.Event) -> None:
        with contextlib.closing(ApiClient(run.ops, run.token).stream("/api/stream")) as lines:
            for _ in lines:  # there is something new every two seconds at least
                if done.is_set():
                    return

    return _meanwhile(watch)


@contextlib.contextmanager
def _collector() -> Iterator[str]:
    """The URL of an OpenTelemetry collector that takes all and keeps nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    with http.server.ThreadingHTTPServer((sides.HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{sides.HOST}:{server.server_address[1]}/v1/traces"
        server.shutdown()


def _scraped(url: str) -> contextlib.AbstractContextManager[None]:
    """Meanwhile somebody scrapes every SCRAPE_EVERY_S, the first time after half of that."""

    def scrape(done: threading.Event) -> None:
        pause_s = SCRAPE_EVERY_S / 2
        while not done.wait(pause_s):
            with urllib.request.urlopen(url, timeout=_SCRAPE_LIMIT_S) as response:
                response.read()
            pause_s = SCRAPE_EVERY_S

    return _meanwhile(scrape)


@contextlib.contextmanager
def _meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread, which ends when the event is set."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_SCRAPE_LIMIT_S)


def summary(pairs: Sequence[Mapping[str, Turn]]) -> dict[str, Any]:
    """Medians over the pairs, and of the ratio the quartiles too."""
    ratios = sorted(pair["on"].throughput / pair["off"].throughput for pair in pairs)
    cpu_ratios = [pair["off"].cpu_ms_per_token / pair["on"].cpu_ms_per_token for pair in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "pairs": len(pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "cpu_ratio": statistics.median(cpu_ratios),
        **{
            side: {
                name: statistics.median(getattr(pair[side], name) for pair in pairs)
                for name in ("throughput", "cpu_ms_per_token")
            }
            for side in SIDES
        },
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines that people read."""
    low, high = result["ratio_quartiles"]
    lines = [f"{'metrics':<8}{'tokens/s':>10}{'CPU ms/token':>14}"]
    lines += [f"{s:<8}{result[s]['throughput']:>10.1f}{result[s]['cpu_ms_per_token']:>14.2f}" for s in SIDES]
    return [
        *lines,
        f"throughput, on / off: {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}, {result['pairs']} pairs)",
        f"CPU time per token, off / on: {result['cpu_ratio']:.3f}",
    ]

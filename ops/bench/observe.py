"""`switchyard bench observe`: what observing costs, as throughput with everything on divided by throughput with it off.

Two clusters of the same model run side by side, one with metrics and spans of a hundredth of its requests, and one with
neither. They take turns of some seconds, in an order that alternates; in each of its turns somebody watches the first
one's console. A round has as many turns as fill the time that `switchyard observe` takes from scrape to scrape, and the
first cluster is scraped once in it. Ratios are taken within a round, so that load from outside moves both. The first
rounds are not counted: caches fill, and Serve comes to rest.
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
from dataclasses import dataclass, fields, replace
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
_UNCOUNTED_ROUNDS = 2


@dataclass(frozen=True)
class Turn:
    """One side's turn, or all of its turns in a round: tokens, CPU seconds that its processes took, how long it was."""

    num_tokens: int
    cpu_s: float
    seconds: float

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def cpu_ms_per_token(self) -> float:
        return self.cpu_s / self.num_tokens * 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench observe`."""
    parser.add_argument("--model", default="demo", metavar="DIR", help="checkpoint (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="so many are measured (default 10)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="requests at the same time (default 8)")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help="tokens per answer (default 64)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Raises ConfigError for options below 1, ServerFailed, LoadError."""
    from deployments.models import resolve_model

    if min(arguments.rounds, arguments.streams) < 1 or arguments.output_tokens < 2:
        raise ConfigError("--rounds and --streams: must be 1 or more, and --output-tokens 2 or more.")
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
        turns = 1
        # Serve's controller and the caches are not yet at rest: these rounds only say how long a turn is.
        for number in range(_UNCOUNTED_ROUNDS):
            found = _round("not counted", number, turns, servers, workload, arguments.streams)
            turns = math.ceil(turns * SCRAPE_EVERY_S / found["off"].seconds)
        rounds = [
            _round(f"round {number}", number, turns, servers, workload, arguments.streams)
            for number in range(1, arguments.rounds + 1)
        ]
    result = summary(rounds)
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


def _round(
    name: str, number: int, num_turns: int, servers: Mapping[str, Server], workload: Workload, streams: int
) -> dict[str, Turn]:
    turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
    for turn in range(num_turns):
        mine = replace(workload, seed=number * num_turns + turn)
        for side in SIDES if (number + turn) % 2 == 0 else SIDES[::-1]:
            with contextlib.ExitStack() as observers:
                if side == "on":
                    observers.enter_context(_watched(run_of(servers[side])))
                    if turn == num_turns // 2:
                        observers.enter_context(_scraped(servers[side].base_url + "/metrics"))
                turns[side].append(_turn(servers[side], mine, streams))
    on, off = (_together(turns[side]) for side in SIDES)
    ratio = on.throughput / off.throughput
    say(f"{name}: on {on.throughput:.1f}, off {off.throughput:.1f} tokens/s: {ratio:.3f} ({off.seconds:.0f} s each)")
    return {"on": on, "off": off}


def _turn(server: Server, workload: Workload, streams: int) -> Turn:
    cpu_s = server.cpu_s()
    level = run_level(server.base_url, server.model, workload, streams, streams)
    return Turn(sum(trace.num_tokens for trace in level.traces), server.cpu_s() - cpu_s, level.duration_s)


def _together(turns: Sequence[Turn]) -> Turn:
    return Turn(*(sum(getattr(turn, field.name) for turn in turns) for field in fields(Turn)))


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
    """Meanwhile somebody scrapes, once."""

    def scrape(_: threading.Event) -> None:
        with urllib.request.urlopen(url, timeout=_SCRAPE_LIMIT_S) as response:
            response.read()

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


def summary(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Any]:
    """Medians over the rounds, and of the ratio the quartiles too."""
    ratios = sorted(each["on"].throughput / each["off"].throughput for each in rounds)
    cpu_ratios = [each["off"].cpu_ms_per_token / each["on"].cpu_ms_per_token for each in rounds]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "rounds": len(rounds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "cpu_ratio": statistics.median(cpu_ratios),
        **{
            side: {
                name: statistics.median(getattr(each[side], name) for each in rounds)
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
        f"throughput, on / off: {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}, {result['rounds']} rounds)",
        f"CPU time per token, off / on: {result['cpu_ratio']:.3f}",
    ]

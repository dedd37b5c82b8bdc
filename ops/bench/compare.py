"""`switchyard bench compare`: colocated vLLM against Switchyard on the same cores, over HTTP, one at a time, in rounds.

The sides alternate, so that both see the same machine. The colocated server stays loaded and is frozen (SIGSTOP) while
it is not its turn; Switchyard is started for its turn and stopped after it, because even an idle Ray takes a part of a
small machine. With --sequential, or when memory is short, only one is loaded at a time.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from cluster.config import Settings, parse_settings
from cluster.errors import ConfigError, SwitchyardError
from ops.bench import report, sides
from ops.bench.load import LevelRun, LoadError, Workload, run_level
from ops.bench.servers import HTTP_TIMEOUT_S, Server, num_cores, total_cpu_s

if TYPE_CHECKING:
    from deployments.conversion import Precision

STATS_PATH = "/switchyard/stats"
WARM_UP_TOKENS = 8
IDLE_S = 5.0
# Beside the checkpoint: three vLLM processes per side, a worker and Ray on ours. Measured, with room.
PROCESSES_BYTES = 4 << 30
KERNEL_FORMAT_FACTOR = 1.5  # weights are held twice for a moment while kernels repack them


class MeasurementFailed(SwitchyardError):
    """A living server did not answer as it should; the message has the last lines of its log."""


@dataclass(frozen=True)
class Plan:
    """What to measure; counts unless a unit is named."""

    streams: tuple[int, ...]
    requests_per_stream: int
    rounds: int
    workload: Workload
    sequential: bool
    start_timeout_s: float


@dataclass
class Side:
    """One of the two servers, when it is up."""

    name: str
    server: Server

    def stats(self) -> Mapping[str, Any] | None:
        """The dispatcher's counters, or None where the server has no such route."""
        try:
            with urllib.request.urlopen(self.server.base_url + STATS_PATH, timeout=HTTP_TIMEOUT_S) as response:
                reading = json.load(response)
        except (urllib.error.URLError, OSError, ValueError):
            return None
        return reading if isinstance(reading, dict) else None


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


class Comparison:
    """Starts the servers, runs the rounds, keeps what was measured."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        environments: Mapping[str, Mapping[str, str]],
        logs: Path,
        switchyard_model: str | None = None,
    ):
        self._plan = plan
        self._settings = settings
        self._switchyard_model = switchyard_model or settings.model
        self._environments = environments
        self._logs = logs
        self.pairs: list[report.Pair] = []
        self.layer_calls: dict[int, list[dict[str, float] | None]] = {streams: [] for streams in plan.streams}
        self.idle_cores: dict[str, float] = {}
        self.start_s: dict[str, float] = {}

    def run(self) -> None:
        """All rounds. Raises ServerFailed or LoadError; the servers are gone afterwards in any case."""
        with contextlib.ExitStack() as stack:
            colocated = None if self._plan.sequential else stack.enter_context(self._started("colocated"))
            if colocated is not None:
                colocated.server.freeze()
            for number in range(self._plan.rounds):
                self._round(number, colocated)

    def run_switchyard(self) -> dict[int, report.Figures]:
        """Switchyard's figures alone, once at every level. Raises as run() does."""
        with self._started("switchyard") as side:
            return {streams: figures for streams, (figures, _) in self._levels(side, 0).items()}

    def _round(self, number: int, colocated: Side | None) -> None:
        """Every level on both sides. The order alternates, so that a drift of the machine favours nobody.

        A colocated server that stays loaded is frozen while it is not its turn; a frozen Ray would be taken for dead by
        its own health checks, so Switchyard is started for its turn and stopped after it.
        """
        measured = {}
        for name in report.SIDES if number % 2 == 0 else report.SIDES[::-1]:
            if name == "colocated" and colocated is not None:
                colocated.server.thaw()
                measured[name] = self._levels(colocated, number)
                colocated.server.freeze()
            else:
                with self._started(name) as side:
                    measured[name] = self._levels(side, number)
        for streams in self._plan.streams:
            self._keep(number, streams, {name: by_level[streams] for name, by_level in measured.items()})

    def _levels(self, side: Side, number: int) -> dict[int, tuple[report.Figures, float]]:
        measured = {}
        for streams in self._plan.streams:
            self._warm_up(side, streams)
            measured[streams] = self._measure(side, streams, number)
        return measured

    def _keep(self, number: int, streams: int, measured: Mapping[str, tuple[report.Figures, float]]) -> None:
        (colocated, other_colocated), (switchyard, other_switchyard) = (measured[name] for name in report.SIDES)
        other = (other_colocated + other_switchyard) / 2
        self.pairs.append(report.Pair(number + 1, streams, colocated, switchyard, other))

    def _measure(self, side: Side, streams: int, number: int) -> tuple[report.Figures, float]:
        before, cpu_before_s, total_before_s = side.stats(), side.server.cpu_s(), total_cpu_s()
        run = self._level(side, streams, self._plan.workload, streams * self._plan.requests_per_stream)
        other_s = (total_cpu_s() - total_before_s) - (side.server.cpu_s() - cpu_before_s) - run.client_cpu_s
        if side.name == "switchyard":
            self.layer_calls[streams].append(report.layer_call(before, side.stats()))
        figures = report.figures(run)
        other_cores = max(0.0, other_s / run.duration_s)
        say(
            f"round {number + 1}/{self._plan.rounds}  {streams:>3} streams  {side.name:<10}  "
            f"{figures.throughput:8.1f} tokens/s  ttft {figures.ttft_ms:7.1f} ms  itl {figures.itl_ms:7.2f} ms  "
            f"(others used {other_cores:.2f} cores)"
        )
        return figures, other_cores

    def _warm_up(self, side: Side, streams: int) -> None:
        self._level(side, streams, replace(self._plan.workload, output_tokens=WARM_UP_TOKENS), streams)

    def _level(self, side: Side, streams: int, workload: Workload, num_requests: int) -> LevelRun:
        try:
            return run_level(side.server.base_url, side.server.model, workload, streams, num_requests)
        except LoadError as error:
            side.server.check_alive()
            raise MeasurementFailed(f"{side.name}: {error}\n{side.server.log_tail()}") from error

    @contextlib.contextmanager
    def _started(self, name: str) -> Iterator[Side]:
        """A side that has answered requests at every level."""
        say(f"{name}: starting (log: {self._logs / f'{name}.log'})")
        with self._launch(name) as server:
            self.start_s[name] = server.wait_ready(
                self._plan.start_timeout_s, lambda elapsed_s: say(f"{name}: still starting, {elapsed_s:.0f} s")
            )
            side = Side(name, server)
            say(f"{name}: ready after {self.start_s[name]:.0f} s, warming up")
            for streams in self._plan.streams:
                self._warm_up(side, streams)
            self._measure_idle(side)
            yield side
            say(f"{name}: stopping")
        if server.killed:
            say(f"{name}: had to kill {', '.join(server.killed)}")

    def _launch(self, name: str) -> Server:
        from ops.ports import free_ports

        (port,) = free_ports(1)
        if name == "colocated":
            command = sides.colocated_command(self._settings, port)
        else:
            config = self._logs / "ray-config.yaml"
            settings = replace(self._settings, model=self._switchyard_model, served_model_name=self._settings.name)
            sides.write_config(config, settings)
            command = sides.switchyard_command(config, port)
        url = f"http://{sides.HOST}:{port}"
        # Ctrl-C is how a user stops `switchyard serve`; vLLM ignores it when it was started in the background.
        stop_signal = signal.SIGTERM if name == "colocated" else signal.SIGINT
        log = self._logs / f"{name}.log"
        return Server(name, command, self._environments[name], url, self._settings.name, log, stop_signal)

    def _measure_idle(self, side: Side) -> None:
        time.sleep(IDLE_S)  # for what starting left to do
        before_s = side.server.cpu_s()
        time.sleep(IDLE_S)
        self.idle_cores[side.name] = (side.server.cpu_s() - before_s) / IDLE_S
        say(f"{side.name}: uses {self.idle_cores[side.name]:.2f} cores while idle")


def fits_twice(checkpoint_bytes: int, available_bytes: int) -> bool:
    """Whether both sides can be loaded at the same time."""
    return 2 * (PROCESSES_BYTES + KERNEL_FORMAT_FACTOR * checkpoint_bytes) < available_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench compare`."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of the checkpoint")
    add("--workers", type=int, default=1, metavar="N", help="expert shards (%(default)s)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="bfloat16", help="precision (%(default)s)")
    add(
        "--experts",
        choices=("int8", "int4"),
        help="convert the experts for Switchyard, beside the model; vLLM keeps bf16",
    )
    add("--streams", type=_counts, default=(1, 8, 32), metavar="N,N,..", help="levels (1,8,32)")
    add("--rounds", type=int, metavar="N", help="both sides are measured so often (3; with --quick 2)")
    add("--requests-per-stream", type=int, default=2, metavar="N", help="in every level (%(default)s)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="length of a prompt (%(default)s)")
    add("--output-tokens", type=int, metavar="N", help="length of an answer (64; with --quick 32)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts (%(default)s)")
    add("--quick", action="store_true", help="fewer rounds and shorter answers: a look, not a result")
    add("--sequential", action="store_true", help="load one side at a time, and start both anew in every round")
    add("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both sides: engine.threads=2")
    for side in report.SIDES:
        add(f"--{side}-env", action="append", default=[], metavar="NAME=VALUE", help=f"for the {side} side only")
    add("--logs", type=Path, metavar="DIR", help="keep the servers' logs here (default: a temporary folder)")
    add("--start-timeout", type=float, default=900.0, metavar="S", help="seconds until ready (%(default)s)")


def _counts(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(word) for word in text.split(",")}))
    if not numbers or numbers[0] < 1:
        raise ValueError
    return numbers


def make_plan(args: argparse.Namespace, vocab: int) -> Plan:
    """The options as a Plan. Raises ConfigError."""
    rounds = args.rounds or (2 if args.quick else 3)
    workload = Workload(vocab, args.prompt_tokens, args.output_tokens or (32 if args.quick else 64), args.seed)
    for option, value, least in (
        ("rounds", rounds, 1),
        ("requests-per-stream", args.requests_per_stream, 1),
        ("prompt-tokens", workload.prompt_tokens, 1),
        ("output-tokens", workload.output_tokens, 2),
    ):
        if value < least:
            raise ConfigError(f"--{option}: is {value}, must be {least} or more.")
    return Plan(args.streams, args.requests_per_stream, rounds, workload, args.sequential, args.start_timeout)


def run(args: argparse.Namespace) -> int:
    """Exit status of `switchyard bench compare`: 0, or 1 when a server failed, or 130 on Ctrl-C."""
    model = Path(args.model).expanduser()
    try:
        plan = make_plan(args, sides.vocabulary_size(model))
        settings = settings_of(args, plan)
        environments = environments_of(args, settings)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    checkpoint_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not plan.sequential and not fits_twice(checkpoint_bytes, psutil.virtual_memory().available):
        say("not enough free memory for both sides at once: measuring them one after the other (--sequential)")
        plan = replace(plan, sequential=True)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
    logs.mkdir(parents=True, exist_ok=True)
    converted = _converted(model, args.experts) if args.experts else None
    comparison = Comparison(plan, settings, environments, logs, converted)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        comparison.run()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except SwitchyardError as error:
        say(f"switchyard bench: {error}")
        return 1
    result = _document(comparison, plan, settings, args)
    print(json.dumps(result, indent=2) if args.json else report.table(result), flush=True)
    return 0


def _converted(model: Path, experts: "Precision") -> str:
    """The model with such experts, in a folder beside it; one that is there already is verified."""
    from deployments.conversion import convert_hub

    folder = model.absolute().with_name(f"{model.name}-{experts}")
    say(f"converting the experts to {experts}: {folder}")
    convert_hub(model, folder, experts)
    return str(folder)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def settings_of(args: argparse.Namespace, plan: Plan) -> Settings:
    """Of both sides, from the options. Raises ConfigError or ValueError."""
    tokens = plan.workload.prompt_tokens + plan.workload.output_tokens
    base = sides.bench_args(
        args.model, num_workers=args.workers, dtype=args.dtype, streams=max(plan.streams), tokens=tokens
    )
    return parse_settings(sides.override(base, args.set))


def environments_of(args: argparse.Namespace, settings: Settings) -> dict[str, dict[str, str]]:
    """What each side is started with. Raises ValueError for an option without `=`."""
    return {
        "colocated": {
            **sides.colocated_environment(settings, os.environ),
            **sides.environment_assignments(args.colocated_env),
        },
        "switchyard": {
            **sides.switchyard_environment(os.environ),
            **sides.environment_assignments(args.switchyard_env),
        },
    }


def _document(comparison: Comparison, plan: Plan, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    from cluster.config import to_args

    described = {
        "rounds": plan.rounds,
        "requests_per_stream": plan.requests_per_stream,
        "prompt_tokens": plan.workload.prompt_tokens,
        "output_tokens": plan.workload.output_tokens,
        "sequential": plan.sequential,
        "cores": num_cores(),
        "application": to_args(settings),
        "colocated_env": args.colocated_env,
        "switchyard_env": args.switchyard_env,
        "switchyard_experts": args.experts or "as they are",
        "idle_cores": comparison.idle_cores,
        "start_s": comparison.start_s,
    }
    layer_calls = {streams: report.mean_layer_call(readings) for streams, readings in comparison.layer_calls.items()}
    return report.document(comparison.pairs, layer_calls, described)

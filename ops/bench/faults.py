"""`switchyard bench faults`: what users notice when processes of a cluster die, hang or lie. Prints the recovery table.

Each row is a load of so many streams on a cluster of its own: calm for a while, then the fault befalls one worker of
every shard in turn (or the router, or an engine), each time until all is whole again.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.config import Settings, parse_settings
from cluster.errors import ConfigError, SwitchyardError
from cluster.sabotage import Fault
from ops.api_client import ApiClient
from ops.bench import sides
from ops.bench.fault_load import FaultLoad, Question
from ops.bench.fault_row import REPLACED, Row, Status, Window, is_whole, make_row, messages_served, served_by, table
from ops.bench.fault_strikes import Victim, strike, victims
from ops.bench.load import Workload
from ops.bench.make_model import ModelShape, make_model
from ops.bench.servers import Server, run_of
from ops.ports import free_ports

TINY = ModelShape(hidden=256, expert=512, layers=4, experts=8, top_k=2, heads=4, kv_heads=2, vocab=1024)
NUM_PROMPTS = 8
OUTPUT_TOKENS = 48
_LOOK_EVERY_S = 0.25
_RECOVERY_LIMIT_S = 180.0
_ANSWER_LIMIT_S = 180.0
_START_LIMIT_S = 600.0
# A fault that nobody ends lasts so long: enough to be noticed, suspected and asked again.
_ENDURED_S = 3.0

Say = Callable[[str], None]


class NotRecovered(SwitchyardError):
    """The cluster was not whole again in time; the message has its last status."""


class Cluster(Protocol):
    """A cluster on this machine whose workers take faults (worker.fault_injection)."""

    url: str
    model: str

    def status(self) -> Status: ...
    def check_integrity(self) -> list[dict[str, Any]]: ...


def expected_tokens(question: Question) -> list[tuple[int, ...]]:
    """The undisturbed answer to each prompt. Raises SwitchyardError when one fails."""
    load = FaultLoad(question, 1)
    with load:
        load.wait_answers(len(question.prompts), _ANSWER_LIMIT_S)
    found: dict[int, tuple[int, ...]] = {}
    for answer in load.answers:
        if answer.error:
            raise SwitchyardError(f"an undisturbed request failed: {answer.error}")
        found[answer.prompt] = answer.tokens
    return [found[prompt] for prompt in range(len(question.prompts))]


def run_row(
    cluster: Cluster,
    question: Question,
    expected: Sequence[tuple[int, ...]],
    fault: Fault,
    streams: int,
    rounds: int = 1,
    most_strikes: int = sys.maxsize,
    relief: bool = False,
) -> Row:
    """One fault under one load; with `relief` one stream is left of it as soon as the victim is out of the way.

    Raises NotRecovered, or StrikeFailed when there was nothing to recover from.
    """
    ordeal = Ordeal(cluster, fault)
    load = FaultLoad(question, streams)
    with load:
        _flow(load, 1)
        calm_s = time.monotonic()
        _flow(load, 2)
        strikes_s: list[float] = []
        times_s: list[float] = []
        for _ in range(rounds):
            for victim in victims(fault, cluster.status())[: most_strikes - len(times_s)]:
                strikes_s.append(time.monotonic())
                times_s.append(ordeal.undergo(victim, load, relief))
        whole_s = time.monotonic()
        if not relief:
            _flow(load, 1)
    problems = [f"{check['subject']}: {check['text']}" for check in cluster.check_integrity() if not check["ok"]]
    window = Window(calm_s, tuple(strikes_s), whole_s, max(times_s))
    return make_row(fault, streams, window, load.answers, expected, [*ordeal.problems, *problems])


def _flow(load: FaultLoad, answers: int) -> None:
    """Wait until every stream has had so many more answers. Raises NotRecovered."""
    if not load.wait_answers(answers, _ANSWER_LIMIT_S):
        raise NotRecovered(f"streams wait for more than {_ANSWER_LIMIT_S:.0f} s for their answers")


class Ordeal:
    """A fault that befalls one victim after the other. `problems` says where the epoch went back."""

    def __init__(self, cluster: Cluster, fault: Fault) -> None:
        self._cluster = cluster
        self._fault = fault
        status = cluster.status()
        self._num_engines = len(status["engines"])
        self._epoch = status["epoch"]
        self.problems: list[str] = []

    def undergo(self, victim: Victim, load: FaultLoad, relief: bool) -> float:
        """Strike, and wait until all is whole again; returns the seconds that took. Raises NotRecovered."""
        served = messages_served(self._cluster.status())
        begin_s = time.monotonic()
        with strike(self._fault, victim):
            if self._fault is Fault.SLOW:
                load.wait_answers(2, _ENDURED_S)
            if self._fault in REPLACED:
                self._wait("out of the way", lambda status: victim.id not in served_by(status))
        if relief:
            _flow(load, 1)
            load.thin_out()
        self._wait("whole", lambda status: is_whole(status, self._fault, victim.id, served, self._num_engines))
        return time.monotonic() - begin_s

    def _wait(self, what: str, condition: Callable[[Status], bool]) -> None:
        deadline_s = time.monotonic() + _RECOVERY_LIMIT_S
        status: Status | None = None
        while status is None or not condition(status):
            if time.monotonic() > deadline_s:
                raise NotRecovered(f"{self._fault.value}: not {what} in time, but {json.dumps(status)}")
            time.sleep(_LOOK_EVERY_S)
            status = self._look()

    def _look(self) -> Status | None:
        """The status; None while nobody answers."""
        try:
            status = self._cluster.status()
        except SwitchyardError:
            return None
        if status["epoch"] < self._epoch:
            self.problems.append(f"the epoch went back from {self._epoch} to {status['epoch']}")
        self._epoch = status["epoch"]
        return status


# -- the command ------------------------------------------------------------------------------------------------------


class ServedCluster:
    """A `switchyard serve` that the benchmark has started."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url, self.model = server.base_url, server.model
        run = run_of(server)
        self._api = ApiClient(run.ops, run.token)

    def status(self) -> Status:
        status: Status = self._api.get("/api/status")
        return status

    def check_integrity(self) -> list[dict[str, Any]]:
        checks: list[dict[str, Any]] = self._api.get("/api/integrity")
        return checks


@contextlib.contextmanager
def served(settings: Settings, logs: Path, say: Say) -> Iterator[ServedCluster]:
    """`switchyard serve` with these settings, from ready to stopped. Raises ServerFailed."""
    (port,) = free_ports(1)
    config = logs / "ray-config.yaml"
    sides.write_config(config, settings)
    command = sides.switchyard_command(config, port)
    environment = sides.switchyard_environment(os.environ)
    url = f"http://{sides.HOST}:{port}"
    say(f"starting a cluster (log: {logs / 'switchyard.log'})")
    log = logs / "switchyard.log"
    with Server("switchyard", command, environment, url, settings.name, log, signal.SIGINT) as server:
        server.wait_ready(_START_LIMIT_S, lambda elapsed_s: say(f"still starting, {elapsed_s:.0f} s"))
        yield ServedCluster(server)
        say("stopping the cluster")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """What kind of cluster faults are tried on."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="folder of the checkpoint (default: a tiny random Mixtral)")
    add("--workers", type=int, default=2, metavar="N", help="expert shards (%(default)s)")
    add("--replicas", type=int, default=2, metavar="R", help="copies of each shard (%(default)s)")
    add("--spares", type=int, default=0, metavar="N", help="warm spares (%(default)s)")
    add("--engines", type=int, default=1, metavar="N", help="vLLM engines (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting: expert_timeout_s=60")
    add("--logs", type=Path, metavar="DIR", help="keep the cluster's logs here (default: a temporary folder)")
    add("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")


def cluster_settings(arguments: argparse.Namespace, logs: Path, streams: int) -> Settings:
    """float32, in which every answer is exact, so that a changed token is a fault. Raises ConfigError."""
    model = Path(arguments.model).expanduser() if arguments.model else logs / "tiny-mixtral"
    if not model.exists() and not arguments.model:
        make_model(model, TINY)
    args = {
        **sides.bench_args(
            str(model), num_workers=arguments.workers, dtype="float32", streams=streams, tokens=4 * OUTPUT_TOKENS
        ),
        "replicas": arguments.replicas,
        "spares": arguments.spares,
        "engines": arguments.engines,
    }
    args["engine"] |= {"enforce_eager": True, "kv_cache_gib": 0.25}
    args["worker"] = {"fault_injection": True}
    try:
        return parse_settings(sides.override(args, arguments.set))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def question_for(settings: Settings, cluster: Cluster) -> Question:
    """The same prompts for every load."""
    workload = Workload(sides.vocabulary_size(Path(settings.model)), 16, OUTPUT_TOKENS)
    return Question(cluster.url, cluster.model, workload.prompts(0, NUM_PROMPTS), OUTPUT_TOKENS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench faults`."""
    parser.add_argument("--faults", metavar="NAME,..", help=f"which (all): {', '.join(fault.value for fault in Fault)}")
    parser.add_argument("--streams", default="1,32", metavar="N,N", help="loads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often each victim is struck (1)")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit status of `switchyard bench faults`: 0 when every row is as promised, 1 otherwise, 130 on Ctrl-C."""
    chosen = _chosen(arguments.faults)
    streams = _counts(arguments.streams)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds: is {arguments.rounds}, must be 1 or more.")
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="switchyard-faults-"))
    logs.mkdir(parents=True, exist_ok=True)
    settings = cluster_settings(arguments, logs, max(streams))
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with served(settings, logs, say) as cluster:
            question = question_for(settings, cluster)
            expected = expected_tokens(question)
            for fault in chosen:
                for count in streams:
                    rows.append(run_row(cluster, question, expected, fault, count, arguments.rounds))
                    say(_words(rows[-1]))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except SwitchyardError as error:
        say(f"switchyard bench: {error}")
        return 1
    finally:
        if rows:
            print(json.dumps([row.to_json() for row in rows], indent=2) if arguments.json else table(rows), flush=True)
    return 0 if all(row.is_as_promised for row in rows) else 1


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def _words(row: Row) -> str:
    verdict = "as promised" if row.is_as_promised else "NOT as promised"
    return (
        f"{row.fault}, {row.streams} streams: {row.failed} of {row.requests} failed, {row.changed} changed, "
        f"longest gap {row.calm_gap_s:.2f} s before, {row.fault_gap_s:.2f} s at the fault, {row.gap_s:.2f} s in all, "
        f"whole again after {row.recovered_s:.1f} s: {verdict}"
    )


def _chosen(names: str | None) -> list[Fault]:
    if names is None:
        return list(Fault)
    known = {fault.value: fault for fault in Fault}
    for name in names.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"--faults: there is no {name}. The nearest is {near}.")
    return [known[name] for name in names.split(",")]


def _counts(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--streams: {text} is not a list of numbers such as 1,32.")
    return counts

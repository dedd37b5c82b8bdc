"""The screen of `switchyard top`: lines of text from a view of the ops API, for a terminal of any size. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from ops.events import event_line
from ops.status import COLOURS, PLAIN, age

_BOLD, _QUIET, _REVERSE = "\033[1m", "\033[2m", "\033[7m"
_BAR_CELLS = 20
_LAST_EVENTS = 6
_WORKERS_HEAD = (
    f"{'WORKER':<22}{'SHARD':>5} {'STATE':<10} {'ROLE':<9}"
    f"{'TOKENS/S':<{_BAR_CELLS + 11}}{'WAITING':>8}{'MEMORY':>11}{'AGE':>8}"
)


View = Mapping[str, Any]


def screen(view: View, columns: int, rows: int, *, colours: bool = False, by_load: bool = False) -> list[str]:
    """At most `rows` - 1 lines of at most `columns` visible characters. Without `colours` no escape sequences."""
    status = view["status"]
    if not status:
        return [view["trouble"] or "the cluster has not been looked at yet"]
    pen = _Pen(columns, colours)
    head = [*_summary(view, pen), "", *_engines(status, pen), ""]
    tail = ["", *(pen.cut(event_line(event)) for event in view["events"][-_LAST_EVENTS:])]
    workers = list(_workers(status, pen, by_load))
    room = max(2, rows - 1 - len(head) - len(tail))
    if len(workers) > room:
        workers = [*workers[: room - 1], pen.cut(f"... and {len(workers) - room + 1} more workers")]
    return [*head, *workers, *tail][: rows - 1]


class _Pen:
    """Cuts and colours lines."""

    def __init__(self, columns: int, colours: bool) -> None:
        self._columns = columns
        self._colours = colours

    def cut(self, text: str, style: str = "") -> str:
        text = text[: self._columns]
        return f"{style}{text}{PLAIN}" if style and self._colours else text

    def line(self, text: str, state: str) -> str:
        """The line with the state in its colour, wherever it stands."""
        text = self.cut(text)
        if not self._colours or state not in COLOURS:
            return text
        return text.replace(f" {state} ", f" {COLOURS[state]}{state}{PLAIN} ", 1)


def _summary(view: View, pen: _Pen) -> Iterator[str]:
    status = view["status"]
    sample = view["samples"][-1] if view["samples"] else {}
    online = sum(_is_online(replica) for shard in status["shards"] for replica in shard["replicas"])
    wanted = sum(shard["wanted"] for shard in status["shards"])
    yield pen.cut(f"{status['model']}   epoch {status['epoch']}   workers {online} of {wanted} online", _BOLD)
    yield pen.cut(
        f"requests {_n(sample.get('running'))} running, {_n(sample.get('waiting'))} waiting   "
        f"tokens/s {_n(sample.get('generated_per_s'))} out, {_n(sample.get('prompt_per_s'))} in   "
        f"first token {_ms(sample.get('first_token_p50_s'))}   between tokens {_ms(sample.get('inter_token_p50_s'))}"
    )
    for shard in status["missing_shards"]:
        yield pen.cut(f"shard {shard} HAS NO WORKER: calls wait for one", COLOURS["gone"])
    if view["trouble"]:
        yield pen.cut(f"no answer from the router: {view['trouble']}", COLOURS["gone"])
    for action in view["actions"]:
        if action["end_s"] is None:
            yield pen.cut(f"under way: {action['name']}: {(action['words'] or ['beginning'])[-1]}", COLOURS["draining"])


def _engines(status: View, pen: _Pen) -> Iterator[str]:
    yield pen.cut(
        f"{'ENGINE':<22}{'STATE':<11}{'RUNNING':>8}{'WAITING':>9}  {'KV CACHE':<{_BAR_CELLS + 7}}{'AGE':>8}", _REVERSE
    )
    for engine in status["engines"]:
        load = engine["load"]
        used = load.get("kv_cache_used", 0.0)
        text = (
            f"{engine['id']:<21} {engine['state']:<10} {_n(load.get('running')):>8}{_n(load.get('waiting')):>9}  "
            f"{_bar(used)} {used:>4.0%}  {age(engine['age_s']):>8}"
        )
        yield pen.line(text, engine["state"])


def _workers(status: View, pen: _Pen, by_load: bool) -> Iterator[str]:
    rows = [(shard, replica) for shard in status["shards"] for replica in shard["replicas"]]
    if by_load:
        rows.sort(key=lambda row: -row[1]["load"].get("tokens_per_s", 0.0))
    most = max([1.0, *(replica["load"].get("tokens_per_s", 0.0) for _, replica in rows)])
    yield pen.cut(_WORKERS_HEAD, _REVERSE)
    for shard, replica in rows:
        load, memory_mib = replica["load"], replica["memory_bytes"] / 2**20
        speed = load.get("tokens_per_s", 0.0)
        text = (
            f"{replica['id']:<22}{shard['id']:>5} {replica['state']:<10} {replica['role']:<9}"
            f"{_bar(speed / most)} {_n(speed):>8}{_n(load.get('waiting')):>8}{memory_mib:>7.0f} MiB"
            f"{age(replica['age_s']):>8}"
        )
        yield pen.line(text, replica["state"])
    for shard in status["shards"]:
        online = sum(map(_is_online, shard["replicas"]))
        if online < shard["wanted"]:
            yield pen.cut(f"shard {shard['id']}: {online} of {shard['wanted']} replicas", COLOURS["draining"])


def _is_online(replica: View) -> bool:
    return bool(replica["state"] == "online" and replica["role"] == "primary")


def _bar(share: float) -> str:
    full = round(min(1.0, max(0.0, share)) * _BAR_CELLS)
    return f"[{'|' * full}{' ' * (_BAR_CELLS - full)}]"


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if 0 < value < 10 and value % 1 else f"{value:,.0f}"


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1000:.0f} ms"

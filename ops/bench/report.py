"""From traces to figures, and from figures to what is printed. Pure functions."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ops.bench.load import LevelRun

SIDES = ("colocated", "switchyard")
STAGES = ("gather", "send", "wait", "compute", "combine")


@dataclass(frozen=True)
class Figures:
    """One level on one side: throughput in output tokens per second, latencies in milliseconds."""

    throughput: float
    ttft_ms: float
    ttft_p99_ms: float
    itl_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


# The name of a ratio and the figure behind it. Every ratio is Switchyard's figure divided by colocated vLLM's.
RATIOS = {"throughput": "throughput", "ttft": "ttft_ms", "itl": "itl_ms"}


def figures(run: LevelRun) -> Figures:
    """Throughput from the first request sent to the last token received; ttft is the median request's.

    itl_ms is the mean time per token after the first: a late client that gets two tokens in one event does not change
    it. The percentiles are over the gaps between events.
    """
    ttft_ms = [1e3 * trace.ttft_s for trace in run.traces]
    gaps_ms = [1e3 * gap for trace in run.traces for gap in trace.gaps_s]
    spans_ms = sum(1e3 * (trace.event_s[-1] - trace.event_s[0]) for trace in run.traces)
    num_tokens = sum(trace.num_tokens for trace in run.traces)
    return Figures(
        throughput=num_tokens / run.duration_s,
        ttft_ms=statistics.median(ttft_ms),
        ttft_p99_ms=percentile(ttft_ms, 99),
        itl_ms=spans_ms / max(1, num_tokens - len(run.traces)),
        itl_p50_ms=percentile(gaps_ms, 50),
        itl_p99_ms=percentile(gaps_ms, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the values do not exceed; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


@dataclass(frozen=True)
class Pair:
    """One level, both sides, measured one right after the other; other_cores is what the rest of the machine took."""

    round: int
    streams: int
    colocated: Figures
    switchyard: Figures
    other_cores: float

    def ratio(self, name: str) -> float:
        """Switchyard divided by colocated; 0 where there is nothing to divide by."""
        base = float(getattr(self.colocated, RATIOS[name]))
        return float(getattr(self.switchyard, RATIOS[name])) / base if base else 0.0


def medians(runs: Iterable[Figures]) -> Figures:
    """Figure by figure."""
    rows = [asdict(run) for run in runs]
    return Figures(**{key: statistics.median(row[key] for row in rows) for key in rows[0]})


def levels_of(pairs: Iterable[Pair]) -> list[int]:
    """The stream counts that were measured, ascending."""
    return sorted({pair.streams for pair in pairs})


def ratio_table(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """throughput_1, ttft_1, itl_1, throughput_8, ...: the ratio of each round, in order."""
    return {
        f"{name}_{streams}": [pair.ratio(name) for pair in pairs if pair.streams == streams]
        for streams in levels_of(pairs)
        for name in RATIOS
    }


def layer_call(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Mean microseconds per layer call and stage between two readings of the dispatcher's counters.

    Counters: calls, tokens, and <stage>_ns of STAGES, all ever growing. `compute` is the workers' own time,
    summed over them; it passes while the engine is in `wait`. None where a reading is missing or nothing was called in
    between.
    """
    if before is None or after is None:
        return None
    wanted = ["calls", "tokens", *(f"{stage}_ns" for stage in STAGES)]
    if not all(isinstance(reading.get(key), int | float) for reading in (before, after) for key in wanted):
        return None
    delta = {key: after[key] - before[key] for key in wanted}
    if delta["calls"] <= 0:
        return None
    return {
        "calls": delta["calls"],
        "tokens_per_call": delta["tokens"] / delta["calls"],
        **{f"{stage}_us": delta[f"{stage}_ns"] / delta["calls"] / 1e3 for stage in STAGES},
    }


def mean_layer_call(readings: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Several readings of one level as one, weighted by their calls."""
    present = [reading for reading in readings if reading]
    if not present:
        return None
    calls = sum(reading["calls"] for reading in present)
    keys = [key for key in present[0] if key != "calls"]
    return {"calls": calls} | {key: sum(r[key] * r["calls"] for r in present) / calls for key in keys}


def document(
    pairs: Sequence[Pair], layer_calls: Mapping[int, Mapping[str, float] | None], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What --json prints. `ratios` are medians over rounds of the ratio within a round, which load from outside moves
    less than either side's figure; `spread` is their least and greatest."""
    table = ratio_table(pairs)
    sides = {
        side: {
            str(streams): asdict(medians(getattr(pair, side) for pair in pairs if pair.streams == streams))
            for streams in levels_of(pairs)
        }
        for side in SIDES
    }
    result: dict[str, Any] = _rounded(
        {
            "ratios": {name: statistics.median(values) for name, values in table.items()},
            "spread": {name: [min(values), max(values)] for name, values in table.items()},
            **sides,
            "layer_call": {str(streams): reading for streams, reading in layer_calls.items()},
            "settings": dict(settings),
            "rounds": [asdict(pair) for pair in pairs],
        }
    )
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def table(result: Mapping[str, Any]) -> str:
    """The document as text for people."""
    return "\n".join([*_figures_lines(result), "", *_ratio_lines(result), "", *_layer_call_lines(result)])


def _figures_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{'streams':>7}  {'side':<10}  {'tokens/s':>9}  {'ttft ms':>9}  {'itl ms':>8}  {'itl p99 ms':>10}"]
    for streams in result[SIDES[0]]:
        for side in SIDES:
            row = result[side][streams]
            lines.append(
                f"{streams:>7}  {side:<10}  {row['throughput']:>9.1f}  {row['ttft_ms']:>9.1f}  {row['itl_ms']:>8.2f}"
                f"  {row['itl_p99_ms']:>10.2f}"
            )
    return lines


def _ratio_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Switchyard / colocated, median of {result['settings']['rounds']} rounds [least, greatest]:",
        f"{'streams':>7}  {'throughput':>20}  {'time to first token':>20}  {'inter-token latency':>20}",
    ]
    for streams in result[SIDES[0]]:
        cells = []
        for name in RATIOS:
            least, greatest = result["spread"][f"{name}_{streams}"]
            cells.append(f"{result['ratios'][f'{name}_{streams}']:.3f} [{least:.2f}, {greatest:.2f}]")
        lines.append(f"{streams:>7}  " + "  ".join(f"{cell:>20}" for cell in cells))
    return lines


def _layer_call_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "Where the time of a layer call goes, mean microseconds (compute: the workers' own time, summed, within wait):",
        f"{'streams':>7}  {'tokens':>7}" + "".join(f"  {stage:>8}" for stage in STAGES),
    ]
    for streams, reading in result["layer_call"].items():
        if reading is None:
            lines.append(f"{streams:>7}  {'n/a':>7}")
            continue
        cells = "".join(f"  {reading[stage + '_us']:>8.0f}" for stage in STAGES)
        lines.append(f"{streams:>7}  {reading['tokens_per_call']:>7.1f}{cells}")
    return lines

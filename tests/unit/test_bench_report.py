"""From traces to figures, ratios and text."""

import json

import pytest

from ops.bench import report
from ops.bench.load import LevelRun, Trace

COUNTERS = {"calls": 10, "tokens": 100, **{f"{stage}_ns": 1000 for stage in report.STAGES}}


def figures_of(throughput: float, ttft_ms: float = 10.0, itl_ms: float = 5.0) -> report.Figures:
    return report.Figures(throughput, ttft_ms, ttft_ms, itl_ms, itl_ms, itl_ms)


def pair(number: int, streams: int, colocated: float, switchyard: float) -> report.Pair:
    return report.Pair(number, streams, figures_of(colocated), figures_of(switchyard, itl_ms=10.0), 0.1)


def test_figures_of_a_level():
    traces = [Trace(0.0, [1.0, 1.5, 2.0], 3), Trace(0.5, [1.0, 2.0], 3)]  # two tokens in the last event
    figures = report.figures(LevelRun(streams=2, duration_s=2.0, client_cpu_s=0.1, traces=traces))
    assert figures.throughput == 3.0
    assert figures.ttft_ms == pytest.approx(750.0)
    assert figures.ttft_p99_ms == pytest.approx(1000.0)
    assert figures.itl_ms == pytest.approx(2000.0 / 4)
    assert figures.itl_p99_ms == pytest.approx(1000.0)


def test_percentile():
    values = [float(value) for value in range(100, 0, -1)]
    assert report.percentile(values, 50) == 50.0
    assert report.percentile(values, 99) == 99.0
    assert report.percentile([7.0], 99) == 7.0
    assert report.percentile([], 50) == 0.0


def test_a_ratio_is_switchyard_over_colocated_within_a_round():
    """A machine that slows down by half between rounds must not move the ratio."""
    pairs = [pair(1, 32, 100.0, 95.0), pair(2, 32, 50.0, 47.5), pair(3, 32, 80.0, 76.0)]
    result = report.document(pairs, {32: None}, {"rounds": 3})
    assert result["ratios"] == {"throughput_32": 0.95, "ttft_32": 1.0, "itl_32": 2.0}
    assert result["spread"]["throughput_32"] == [0.95, 0.95]
    assert result["colocated"]["32"]["throughput"] == 80.0
    assert result["switchyard"]["32"]["throughput"] == 76.0


def test_the_document_is_json_with_every_level():
    pairs = [pair(1, streams, 10.0, 9.0) for streams in (1, 8, 32)]
    result = json.loads(json.dumps(report.document(pairs, {1: None, 8: None, 32: None}, {"rounds": 1})))
    assert set(result) == {"ratios", "spread", "colocated", "switchyard", "layer_call", "settings", "rounds"}
    assert {"throughput_1", "throughput_8", "throughput_32", "ttft_1", "itl_32"} <= set(result["ratios"])
    assert len(result["rounds"]) == 3


def test_layer_call_is_the_mean_between_two_readings():
    after = {
        "calls": 14,
        "tokens": 108,
        "gather_ns": 9000,
        "send_ns": 5000,
        "wait_ns": 401000,
        "compute_ns": 201000,
        "combine_ns": 1000,
        "epoch": 3,
        "links": {},
    }
    reading = report.layer_call(COUNTERS, after)
    assert reading == {
        "calls": 4,
        "tokens_per_call": 2.0,
        "gather_us": 2.0,
        "send_us": 1.0,
        "wait_us": 100.0,
        "compute_us": 50.0,
        "combine_us": 0.0,
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, COUNTERS), (COUNTERS, None), (COUNTERS, COUNTERS), (COUNTERS, {"calls": 12}), ({}, COUNTERS)],
)
def test_layer_call_without_two_good_readings_is_none(before, after):
    assert report.layer_call(before, after) is None


def test_readings_are_averaged_by_their_calls():
    few, many = ({"calls": calls, "wait_us": wait_us} for calls, wait_us in ((1, 40.0), (3, 80.0)))
    assert report.mean_layer_call([few, None, many]) == {"calls": 4, "wait_us": 70.0}
    assert report.mean_layer_call([None]) is None


def test_the_table_names_levels_sides_ratios_and_stages():
    reading = {"calls": 4, "tokens_per_call": 2.0, **{f"{stage}_us": 11.0 for stage in report.STAGES}}
    result = report.document([pair(1, 8, 10.0, 9.0), pair(1, 32, 20.0, 19.0)], {8: reading, 32: None}, {"rounds": 1})
    text = report.table(result)
    assert "0.950 [0.95, 0.95]" in text
    assert text.count("colocated") >= 2
    assert all(stage in text for stage in report.STAGES)
    assert text.splitlines()[-1].split() == ["32", "n/a"]

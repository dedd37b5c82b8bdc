"""What `switchyard bench observe` makes of its turns, and that its numbers are refused below 1."""

import json

import pytest

from ops import cli
from ops.bench.observe import Turn, summary, table


def test_ratios_are_taken_within_pairs():
    """A machine that is half as fast during the second pair moves neither ratio."""
    pairs = [
        {"on": Turn(99.0, 2.02, 15.0), "off": Turn(100.0, 2.0, 15.0)},
        {"on": Turn(49.5, 4.04, 15.0), "off": Turn(50.0, 4.0, 15.0)},
        {"on": Turn(98.0, 2.04, 15.0), "off": Turn(100.0, 2.0, 15.0)},
    ]
    result = summary(pairs)
    assert result["ratio"] == pytest.approx(0.99) and result["cpu_ratio"] == pytest.approx(2 / 2.02)
    assert result["on"]["throughput"] == 98.0 and result["pairs"] == 3
    assert "0.990" in table(result)[3]
    assert summary(pairs[:1])["ratio_quartiles"] == pytest.approx([0.99, 0.99])


@pytest.mark.parametrize("words", [["observe", "--pairs", "0"], ["layer-call", "--tokens", "0"]])
def test_counts_below_one_are_refused(words, capsys):
    assert cli.main(["bench", *words]) == cli.USAGE_ERROR
    assert "must be 1 or more" in capsys.readouterr().err


def test_a_layer_call_can_be_measured(capsys):
    assert cli.main(["bench", "layer-call", "--calls", "20", "--tokens", "1", "3", "--hidden", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cost["num_tokens"] for cost in result["calls"]] == [1, 3]
    assert result["bookkeeping_us"] > 0

"""What `switchyard bench observe` makes of its turns, and that its numbers are refused below 1."""

import json

import pytest

from ops import cli
from ops.bench.observe import Turn, summary, table


def test_ratios_are_taken_within_rounds():
    """A machine that is half as fast during the second round moves neither ratio."""
    rounds = [
        {"on": Turn(990, 2.02 * 0.99, 10.0), "off": Turn(1000, 2.0, 10.0)},
        {"on": Turn(495, 4.04 * 0.495, 10.0), "off": Turn(500, 2.0, 10.0)},
        {"on": Turn(980, 2.04 * 0.98, 10.0), "off": Turn(1000, 2.0, 10.0)},
    ]
    result = summary(rounds)
    assert result["ratio"] == pytest.approx(0.99) and result["cpu_ratio"] == pytest.approx(2 / 2.02)
    assert result["on"]["throughput"] == 98.0 and result["rounds"] == 3
    assert "0.990" in table(result)[3]
    assert summary(rounds[:1])["ratio_quartiles"] == pytest.approx([0.99, 0.99])


@pytest.mark.parametrize("words", [["observe", "--rounds", "0"], ["layer-call", "--tokens", "0"]])
def test_counts_below_one_are_refused(words, capsys):
    assert cli.main(["bench", *words]) == cli.USAGE_ERROR
    assert "must be 1 or more" in capsys.readouterr().err


def test_a_layer_call_can_be_measured(capsys):
    assert cli.main(["bench", "layer-call", "--calls", "20", "--tokens", "1", "3", "--hidden", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cost["num_tokens"] for cost in result["calls"]] == [1, 3]
    assert result["bookkeeping_us"] > 0

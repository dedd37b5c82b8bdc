"""The quality of integer experts: measured on a small text, and how the table reads."""

from pathlib import Path

import pytest

from deployments.quality import Quality
from model.demo import quality
from model.demo.corpus import Chapter
from ops.bench.quality import table
from ops.cli import main

DEMO = Path(quality.__file__).parent / "checkpoint"


def test_more_bits_are_nearer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "And it came to pass in those days, that there went out a decree from the king, that all should be counted. "
    monkeypatch.setattr(quality, "load_corpus", lambda cache: ([], [Chapter("bible", text * 3)]))
    said: list[str] = []
    bf16, int8, int4 = quality.measure(DEMO, tmp_path, None, said.append)
    assert [row.precision for row in (bf16, int8, int4)] == ["bf16", "int8", "int4"]
    assert bf16.agreement == 1.0
    assert abs(int8.perplexity / bf16.perplexity - 1) < 0.01
    assert abs(int8.perplexity - bf16.perplexity) < abs(int4.perplexity - bf16.perplexity) < 0.2 * bf16.perplexity
    assert said[0] == f"bf16: {bf16.num_tokens} tokens"


def test_the_table() -> None:
    rows = [Quality("bf16", 100, 40.0, 1.0), Quality("int4", 100, 41.0, 0.955)]
    assert table(rows).splitlines()[2:] == [
        "| bf16 | 40.000 | +0.00% | 100.00% |",
        "| int4 | 41.000 | +2.50% | 95.50% |",
        "",
        "100 held-out tokens",
    ]


def test_a_count_of_tokens_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--max-tokens", "0"]) == 2
    assert "--max-tokens: is 0" in capsys.readouterr().err

"""The recovery table: what is counted, what is measured, and when a cluster is whole again."""

import json
import os
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.sabotage import Fault
from ops.bench.fault_load import Answer, _parsed
from ops.bench.fault_row import Window, is_whole, make_row, messages_served, table
from ops.bench.faults import _chosen, _counts
from ops.bench.soak import Footprint, footprint, leaks

EXPECTED = [(1, 2, 3), (4, 5, 6)]
WINDOW = Window(calm_s=0.0, strikes_s=(10.0,), whole_s=20.0, recovered_s=9.5)


def answer(prompt: int, sent_s: float, *event_s: float, **fields: Any) -> Answer:
    return Answer(prompt, sent_s, list(event_s), **{"tokens": EXPECTED[prompt], "ended_s": event_s[-1], **fields})


def row_of(fault: Fault, *answers: Answer, problems: tuple[str, ...] = ()):
    return make_row(fault, 2, WINDOW, answers, EXPECTED, problems)


def test_gaps_are_measured_from_sending_on_and_compared_with_the_calm():
    later = answer(0, 12.2, 13.0, 16.0)
    row = row_of(Fault.SIGKILL, answer(0, 1.0, 1.5, 2.0, 2.2), answer(1, 9.0, 9.9, 12.0, 12.1), later)
    assert (row.requests, row.failed, row.changed, row.strikes) == (2, 0, 0, 1)
    assert row.calm_gap_s == pytest.approx(0.9)
    assert row.fault_gap_s == pytest.approx(2.1) and row.gap_s == pytest.approx(3.0), "the longest came later"
    assert row.extra_gap_s == pytest.approx(1.2)
    assert row.throughput == pytest.approx((4 / 10) / (4 / 10))
    assert row.is_as_promised


def test_a_changed_token_a_failure_or_a_fault_of_the_accounts_is_not_as_promised():
    changed = answer(0, 11.0, 12.0, tokens=(1, 2, 4))
    failed = answer(0, 11.0, 12.0, tokens=(), error="HTTP 503: later")
    unclean = answer(0, 11.0, 12.0, tokens=(), error="the stream broke off", is_clean=False)
    assert row_of(Fault.SLOW, changed).changed == 1
    assert row_of(Fault.SLOW, failed).errors == ("HTTP 503: later",)
    for bad in (changed, failed, unclean):
        assert not row_of(Fault.SLOW, bad).is_as_promised
    assert not row_of(Fault.SLOW, answer(0, 11.0, 12.0), problems=("engine: 3 rows lost",)).is_as_promised
    assert row_of(Fault.ENGINE_LOSS, failed).is_as_promised, "its requests end with a clean error"
    assert not row_of(Fault.ENGINE_LOSS, unclean).is_as_promised


def test_the_table_names_what_went_wrong():
    text = table([row_of(Fault.NOT_FINITE, answer(0, 11.0, 12.0)), row_of(Fault.SLOW, problems=("it leaks",))])
    assert "| nan | 2 | 1 | 0 | 0 | 0.00 | 0.00 | 1.00 | 9.5 |" in text
    assert text.endswith("slow, 2 streams: it leaks")


def status(*ids: str, messages: int = 5, engine: str = "engine-1", state: str = "online") -> dict[str, Any]:
    replicas = [{"id": name, "state": state, "role": "primary", "load": {"messages": messages}} for name in ids]
    return {
        "shards": [{"id": 0, "wanted": 2, "replicas": replicas}],
        "engines": [{"id": engine, "state": "ready"}],
    }


def test_whole_is_when_every_replica_serves_again():
    before = messages_served(status("a", "b"))
    whole = status("a", "b", messages=6)
    assert is_whole(whole, Fault.SLOW, "a", before, 1)
    assert not is_whole(status("a", "b"), Fault.SLOW, "a", before, 1), "none has served since"
    assert not is_whole(status("b", messages=6), Fault.SLOW, "a", before, 1), "one is missing"
    assert not is_whole(status("a", "b", messages=6, state="draining"), Fault.SLOW, "a", before, 1)
    assert not is_whole(whole, Fault.SIGKILL, "a", before, 1), "it cannot be back"
    assert is_whole(status("c", "b", messages=6), Fault.SIGKILL, "a", before, 1)
    assert not is_whole(whole, Fault.ENGINE_LOSS, "engine-1", before, 1)
    assert is_whole(status("a", "b", messages=6, engine="engine-2"), Fault.ENGINE_LOSS, "engine-1", before, 1)
    assert not is_whole(whole, Fault.ENGINE_LOSS, "engine-2", before, 2)


def event(**choice: Any) -> bytes:
    return json.dumps({"choices": [{"text": "", **choice}]}).encode()


def test_an_answer_is_complete_or_says_why_not():
    def parsed(*payloads: bytes, status: int = 200) -> Answer:
        return _parsed(Answer(0, 0.0, [float(i) for i in range(len(payloads))]), payloads, status, 2)

    complete = parsed(event(token_ids=[7]), event(token_ids=[8]), b"[DONE]")
    assert complete.tokens == (7, 8) and not complete.error and complete.event_s == [0.0, 1.0]
    assert parsed(event(token_ids=[7]), b"[DONE]").error == "1 tokens, 2 were asked for"
    broken = parsed(event(token_ids=[7]))
    assert broken.error == "the stream broke off" and not broken.is_clean
    error = json.dumps({"error": {"message": "no experts", "type": "ServiceUnavailableError", "code": 503}}).encode()
    ended = parsed(event(token_ids=[7]), error, b"[DONE]")
    assert ended.error == "error event: no experts" and ended.is_clean
    assert parsed(error, status=503).is_clean
    refused = parsed(b"<html>", status=502)
    assert not refused.is_clean and refused.error.startswith("HTTP 502")


def test_names_and_numbers_of_the_command_are_checked():
    assert _chosen("slow,nan") == [Fault.SLOW, Fault.NOT_FINITE] and _chosen(None) == list(Fault)
    with pytest.raises(ConfigError, match="nearest is sigkill"):
        _chosen("sigkil")
    for text in ("", "0", "1,x"):
        with pytest.raises(ConfigError, match="--streams"):
            _counts(text)


def test_a_leak_is_what_a_restart_does_not_explain():
    before = Footprint(num_processes=20, num_descriptors=1000, memory_bytes=4 << 30, num_shared_files=3)
    assert leaks(before, before) == []
    assert leaks(before, Footprint(19, 1050, (4 << 30) + (100 << 20), 2)) == []
    found = leaks(before, Footprint(21, 1200, 5 << 30, 4))
    assert [text.split(":")[0] for text in found] == ["processes", "files in /dev/shm", "descriptors", "memory"]


def test_the_footprint_of_this_process_holds_its_descriptors():
    before = footprint(os.getpid())
    with open(os.devnull), open(os.devnull):  # noqa: PTH123
        assert footprint(os.getpid()).num_descriptors == before.num_descriptors + 2
    assert before.num_processes >= 1 and before.memory_bytes > 1 << 20

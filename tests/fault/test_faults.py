"""Every fault of the suite, done to real processes under load: no request is lost, and no token changes."""

import json
from typing import Any

import pytest

from cluster.errors import SwitchyardError
from cluster.sabotage import Fault
from ops.bench.fault_load import Question
from ops.bench.fault_row import Row, Status
from ops.bench.faults import expected_tokens, run_row
from ops.bench.soak import Footprint, footprint, leaks
from tests import golden
from tests.serving import Serving, wait_until

pytestmark = pytest.mark.timeout(300)

OUTPUT_TOKENS = 16
# A worker that is blamed is replaced in the same way whatever for: one such fault stands for all of them here;
# `switchyard bench faults` does each, and tests/unit/test_sabotage.py shows that each is noticed for what it is.
LIKE_NOT_FINITE = {Fault.WRONG_SHAPE, Fault.WRONG_SECRET, Fault.WRONG_MODEL}
FAULTS = [fault for fault in Fault if fault not in LIKE_NOT_FINITE]
MANY = 32
# What the faults that are noticed at once may cost in a stream, beyond what it waits without them.
EXTRA_GAP_S = {Fault.SIGKILL: 0.3, Fault.SIGSTOP: 1.5}
# A machine that is short of cores starts the successor while it serves. Without failing over it would be 10 s and more.
SLACK_S = 4.0


class FaultyCluster:
    """ops.bench.faults.Cluster on the tests' Ray."""

    def __init__(self, serving: Serving) -> None:
        self.url, self.model = serving.url, serving.model
        self._serving = serving

    def status(self) -> Status:
        return self._ask("status")

    def check_integrity(self) -> list[dict[str, Any]]:
        return self._ask("check_integrity")

    def _ask(self, method: str) -> Any:
        try:
            return self._serving.ask("control", method=method)
        except RuntimeError as error:
            raise SwitchyardError(str(error)) from None


@pytest.fixture(scope="module")
def cluster(replicated: Serving) -> FaultyCluster:
    return FaultyCluster(replicated)


@pytest.fixture(scope="module")
def question(cluster: FaultyCluster) -> Question:
    prompts = [case.prompt for case in golden.load("mixtral-tiny")]
    return Question(cluster.url, cluster.model, prompts, OUTPUT_TOKENS)


@pytest.fixture(scope="module")
def expected(question: Question) -> list[tuple[int, ...]]:
    return expected_tokens(question)


@pytest.fixture(scope="module")
def before(serving: Serving, expected: list[tuple[int, ...]]) -> Footprint:
    """What the whole cluster takes after its first requests."""
    return footprint(serving.process_id)


def check(row: Row) -> None:
    said = json.dumps(row.to_json())
    assert row.strikes == 1 and row.requests >= row.streams, said
    assert row.is_as_promised, said


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.value)
def test_a_fault_under_many_streams_is_not_noticed(cluster, question, expected, before, fault):
    row = run_row(cluster, question, expected, fault, streams=MANY, most_strikes=1, relief=True)
    if fault is Fault.ENGINE_LOSS:
        assert row.failed and not row.changed and not row.problems, "there is no other engine, and no other harm"
        # What reaches the engine in the moment in which its process ends may find its connection closed (README.md).
        assert row.unclean <= 2, row
        return
    check(row)
    if fault in EXTRA_GAP_S:
        assert row.extra_gap_s < EXTRA_GAP_S[fault] + SLACK_S, row


def test_a_lost_answer_under_one_stream_is_not_noticed(cluster, question, expected):
    check(run_row(cluster, question, expected, Fault.DROPPED_REPLY, streams=1, most_strikes=1))


def test_after_all_faults_nothing_has_leaked(serving, before):
    wait_until(lambda: not leaks(before, footprint(serving.process_id)), "processes that were replaced are gone")

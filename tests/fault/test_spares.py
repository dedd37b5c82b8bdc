"""Warm spares: what a shard without replicas costs when somebody is ready to adopt it."""

import os
import signal
import threading

import pytest

from tests.serving import REPLICATED, wait_until
from tests.streams import Answer, ask, replicas, status

pytestmark = pytest.mark.timeout(600)

SPARE_TAKES_S = 3.0


def test_a_warm_spare_adopts_a_lost_shard_in_the_middle_of_an_answer(serving):
    serving.deploy({**REPLICATED, "replicas": 1, "spares": 1})
    wait_until(lambda: [s["state"] for s in status(serving)["spares"]] == ["ready"], "the spare is warm")
    undisturbed = ask(serving)
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(ask(serving)))
    epoch = status(serving)["epoch"]
    (victim,) = replicas(serving, 0)
    asking.start()
    os.kill(victim["pid"], signal.SIGKILL)
    asking.join()
    assert answers[0].text == undisturbed.text
    assert answers[0].longest_gap_s < SPARE_TAKES_S
    assert status(serving)["epoch"] > epoch
    # The worker comes back, and the spare becomes one again.
    wait_until(lambda: len(replicas(serving, 0)) == 1, "Serve has started another worker")
    wait_until(lambda: [s["state"] for s in status(serving)["spares"]] == ["ready"], "the spare is free again")
    assert replicas(serving, 0, role="spare") == []
    assert ask(serving).text == undisturbed.text
    kinds = [event["kind"] for event in status(serving)["events"]]
    story = ["worker_lost", "shard_missing", "spare_adopting", "shard_back", "spare_released"]
    assert [kind for kind in kinds if kind in story] == story

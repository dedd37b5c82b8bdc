"""Load comes and goes: shards and engines follow it, down to no engine at all, and no answer fails or changes."""

import pytest

from tests.serving import GOLDENS, Serving, wait_until
from tests.streams import STREAMS, Load, ask, replicas, status

pytestmark = pytest.mark.timeout(900)

SCALED = {
    "model": str(GOLDENS / "mixtral-tiny"),
    "dtype": "float32",
    "workers": 2,
    "engine": {"kv_cache_gib": 0.25, "enforce_eager": True},
    "autoscaling": {
        "engines": {
            "min_replicas": 0,
            "max_replicas": 2,
            "target_ongoing_requests": 2 * STREAMS,
            "upscale_delay_s": 1,
            "downscale_delay_s": 5,
        },
        # The tiny model's kernels take a small part of the time; which shard is busier, its router decides.
        "experts": {
            "max_replicas": 2,
            "max_workers": 3,
            "scale_up_at": 0.005,
            "scale_down_at": 0.001,
            "upscale_delay_s": 2,
            "downscale_delay_s": 5,
        },
    },
}
START_LIMIT_S = 300.0


def workers(serving: Serving) -> int:
    return sum(len(replicas(serving, shard)) for shard in (0, 1))


def test_shards_and_engines_follow_the_load(serving: Serving):
    serving.deploy(SCALED)
    undisturbed = ask(serving)
    load = Load(serving)
    try:
        wait_until(lambda: workers(serving) == 3, "the busiest shard has another replica", START_LIMIT_S)
    finally:
        load.stop()
    wait_until(lambda: workers(serving) == 2, "the shards are back to one replica each", START_LIMIT_S)
    wait_until(lambda: not status(serving)["engines"], "no engine is left", START_LIMIT_S)
    assert ask(serving).text == undisturbed.text, "the first request starts an engine, and waits for it"
    assert load.errors == []
    assert {answer.text for answer in load.answers} == {undisturbed.text}
    events = status(serving)["events"]
    kinds = [event["kind"] for event in events]
    assert "engine_left" in kinds and "engine_lost" not in kinds
    scaled = [event["text"] for event in events if event["kind"] == "scaled"]
    assert any("1 -> 2 replicas, busy" in text for text in scaled) and any("2 -> 1" in text for text in scaled)

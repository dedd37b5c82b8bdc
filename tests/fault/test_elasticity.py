"""Workers come, go and are replaced while people ask: every answer stays the same, and nobody waits for long."""

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

import pytest

from deployments.vllm_app import engine_processes
from tests.serving import Serving, wait_until
from tests.streams import STREAMS, Answer, Load, ask, completion, replicas, status

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def undisturbed(replicated: Serving) -> Answer:
    return ask(replicated)


def test_drained_scaled_and_restarted_under_load_nobody_notices(replicated, undisturbed):
    first, second = (each["id"] for each in replicas(replicated, 0))
    load = Load(replicated)
    try:
        replicated.ask("control", method="drain", worker=first)
        assert [each["id"] for each in replicas(replicated, 0)] == [second]
        with pytest.raises(RuntimeError, match="the last replica of shard 0"):
            replicated.ask("control", method="drain", worker=second)
        with pytest.raises(RuntimeError, match="there is no worker nobody"):
            replicated.ask("control", method="drain", worker="nobody")
        for count in (3, 1, 2):
            replicated.ask("control", method="scale", shard=0, replicas=count)
            assert len(replicas(replicated, 0)) == count
        before = {each["id"] for shard in (0, 1) for each in replicas(replicated, shard)}
        replicated.ask("control", method="restart")
        for shard in (0, 1):
            after = {each["id"] for each in replicas(replicated, shard)}
            assert len(after) == 2 and not after & before
        for arguments in ({"shard": 0, "replicas": 0}, {"shard": 9, "replicas": 1}):
            with pytest.raises(RuntimeError):
                replicated.ask("control", method="scale", **arguments)
    finally:
        load.stop()
    assert load.errors == []
    assert len(load.answers) > STREAMS
    assert {answer.text for answer in load.answers} == {undisturbed.text}
    integrity = replicated.ask("control", method="check_integrity")
    assert len(integrity) == 5 and all(each["ok"] for each in integrity), integrity


def test_a_dead_engine_ends_its_requests_with_an_error_and_is_replaced(replicated, undisturbed):
    """EngineCore is killed: a stream that has begun ends with an error event, another request with 503."""
    (engine,) = status(replicated)["engines"]
    core, _ = engine_processes(engine["pid"])
    with urllib.request.urlopen(completion(replicated, 400), timeout=60) as response:
        lines = iter(response)
        assert next(lines).startswith(b"data: {")
        core.kill()
        rest = [line for line in lines if line.strip()]
    assert rest[-1].strip() == b"data: [DONE]"
    error = json.loads(rest[-2].removeprefix(b"data: "))["error"]
    assert error["code"] >= 500 and error["message"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(completion(replicated, 5, stream=False), timeout=60)
    assert refused.value.code == 503 and int(refused.value.headers["Retry-After"]) > 0
    assert json.loads(refused.value.read())["error"]["type"] == "ServiceUnavailableError"
    wait_until(lambda: _answers(replicated), "another engine serves", limit_s=300.0)
    assert ask(replicated).text == undisturbed.text
    (successor,) = status(replicated)["engines"]
    assert successor["id"] != engine["id"] and successor["state"] == "ready"


def _answers(serving: Serving) -> bool:
    host = urllib.parse.urlsplit(serving.url).netloc
    # Where no engine is left, the proxy keeps a request until there is one.
    connection = http.client.HTTPConnection(host, timeout=300)
    request = completion(serving, 2, stream=False)
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/completions", request.data, dict(request.header_items()))
            return connection.getresponse().status == 200
        except ConnectionError:  # it was on its way to the engine in the moment in which that ended
            return False

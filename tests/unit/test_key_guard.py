"""The middleware that asks for API keys, as plain ASGI: who gets in, what strangers learn and cost, and who waits."""

import asyncio
import json

import pytest

from cluster.api_keys import KeyRing, with_new_key
from deployments.key_guard import NO_KEY, Authorised, Gate

RING, RECORD, KEY = with_new_key(KeyRing(), "alice", 0.0, None, 1)
RING, FREE, FREE_KEY = with_new_key(RING, "bob", 0.0, None, None)
RING, _, LOGGED_KEY = with_new_key(RING, "carol", 0.0, None, None, log_prompts=True)


class Method:
    """A handle's method: `answer(*args)` is what remote() brings."""

    def __init__(self, answer) -> None:
        self.answer, self.calls = answer, []

    def remote(self, *args):
        self.calls.append(args)

        async def result():
            return self.answer(*args)

        return asyncio.ensure_future(result())


class FakeGatekeeper:
    def __init__(self, wait_s: float = 0.0, is_gone: bool = False) -> None:
        def admit(*_):
            if is_gone:
                raise RuntimeError("the actor died")
            return wait_s

        self.admit, self.release = Method(admit), Method(lambda *_: None)
        self.follow = Method(lambda *_: ("1", RING.to_json()))


async def app(scope, receive, send):
    app.scopes.append(scope)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"secret weights"})


def ask(*headers, path="/v1/models", kind="http", gatekeeper=None, known=True, times=1, inner=app):
    """Status, headers and body of the last of `times` requests that are open at the same time."""
    app.scopes = []
    sent: list[dict] = []

    async def receive():
        pytest.fail("the body of a refused request was read")

    async def send(message):
        sent.append(message)

    async def scenario():
        gate = Gate(gatekeeper or FakeGatekeeper(), "engine-0", 1)
        gate.ring = RING if known else None
        gate._following.cancel()
        scope = {"type": kind, "method": "GET", "path": path, "headers": list(headers)}
        for _ in range(times):
            await Authorised(inner, gate)(dict(scope), receive, send)
        assert not gate._leases

    asyncio.run(scenario())
    start = sent[-2] if kind == "http" else sent[-1]
    return start.get("status"), dict(start.get("headers", ())), sent[-1].get("body")


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key.encode()


def test_a_valid_key_gets_in_and_goes_no_further():
    assert ask(bearer(FREE_KEY), (b"accept", b"*/*"))[::2] == (200, b"secret weights")
    assert app.scopes[0]["headers"] == [(b"accept", b"*/*")]
    assert ask((b"x-api-key", FREE_KEY.encode()))[0] == 200


def test_strangers_get_the_same_answer_whatever_they_try():
    tries = [ask(path=path) for path in ("/v1/models", "/metrics", "/no/such/path", "/health/", "/v1/chat/completions")]
    tries += [ask(bearer(key)) for key in ("", "x", FREE_KEY[:-1], KEY[:16] + FREE_KEY[16:], "sy-" + "0" * 60)]
    tries += [ask(bearer(FREE_KEY), bearer(FREE_KEY))]
    assert all(each == tries[0] for each in tries) and not app.scopes
    status, headers, body = tries[0]
    assert status == 401 and headers[b"www-authenticate"] == b"Bearer"
    assert json.loads(body) == {"error": {"message": NO_KEY, "type": "UnauthorizedError", "param": None, "code": 401}}


def test_health_needs_no_key_and_websockets_do():
    assert ask(path="/health")[0] == 200
    ask(path="/v1/realtime", kind="websocket")
    assert not app.scopes


def test_before_the_keys_are_known_nobody_gets_in():
    status, headers, _ = ask(bearer(FREE_KEY), known=False)
    assert status == 503 and headers[b"retry-after"]


def test_a_key_over_its_limit_is_told_when_to_come_again():
    gatekeeper = FakeGatekeeper(wait_s=2.1)
    status, headers, body = ask(bearer(KEY), gatekeeper=gatekeeper)
    assert (status, headers[b"retry-after"], json.loads(body)["error"]["code"]) == (429, b"3", 429)
    assert not app.scopes and not gatekeeper.release.calls


def test_only_keys_with_limits_cost_a_question_and_every_lease_is_given_back():
    gatekeeper = FakeGatekeeper()
    assert ask(bearer(FREE_KEY), gatekeeper=gatekeeper)[0] == 200 and not gatekeeper.admit.calls
    assert ask(bearer(KEY), gatekeeper=gatekeeper, times=3)[0] == 200
    asked = [lease for _, _, lease in gatekeeper.admit.calls]
    assert len(set(asked)) == 3 and [lease for _, lease in gatekeeper.release.calls] == asked


def test_only_the_key_that_asked_for_it_has_its_prompts_logged(caplog):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"an answer " * 10_000})

    with caplog.at_level("INFO", logger="ray.serve"):
        for key in (KEY, FREE_KEY):
            assert ask(bearer(key), inner=inner)[0] == 200
        assert "an answer" not in caplog.text
        assert ask(bearer(LOGGED_KEY), path="/v1/completions", inner=inner)[0] == 200
    (line,) = (record.message for record in caplog.records if record.message.startswith("prompt log: "))
    logged = json.loads(line.removeprefix("prompt log: "))
    assert (logged["key"], logged["path"]) == ("carol", "/v1/completions")
    assert logged["answered"].startswith("an answer ") and len(logged["answered"]) == 1 << 16
    assert LOGGED_KEY not in line


def test_without_a_gatekeeper_an_engine_keeps_its_share_of_the_limits():
    seen = []

    async def inner(scope, receive, send):
        if not seen:  # a second request while the first is open
            seen.append(ask_again := Authorised(app, scope["gate"]))
            messages = []

            async def collect(message):
                messages.append(message)

            await ask_again({**scope, "headers": [bearer(KEY)]}, receive, collect)
            seen.append(messages[0]["status"])
        await app(scope, receive, send)

    async def scenario():
        gate = Gate(FakeGatekeeper(is_gone=True), "engine-0", 4)
        gate.ring = RING
        gate._following.cancel()
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [bearer(KEY)], "gate": gate}
        statuses = []

        async def send(message):
            statuses.append(message.get("status"))

        app.scopes = []
        for _ in range(2):
            await Authorised(inner, gate)(dict(scope), None, send)
        assert [each for each in statuses if each] == [200, 200]

    asyncio.run(scenario())
    assert seen[1] == 429


def test_the_ring_follows_the_gatekeeper():
    async def scenario():
        gatekeeper = FakeGatekeeper()
        gate = Gate(gatekeeper, "engine-0", 1)
        while gate.ring is None:
            await asyncio.sleep(0)
        assert gate.ring.find(KEY, 0.0) == RECORD
        while len(gatekeeper.follow.calls) < 2:
            await asyncio.sleep(0)
        assert [call[1] for call in gatekeeper.follow.calls[:2]] == ["", "1"]
        assert not gate.is_broken
        gate.close()

    asyncio.run(scenario())

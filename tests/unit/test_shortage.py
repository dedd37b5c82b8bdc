"""Requests while experts are gone, as plain ASGI: 503 before an answer has begun, an error event after."""

import asyncio
import json

import pytest

from deployments.shortage import EndInShortage, Shortage

POST = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


class Streaming:
    """An app that sends `num_events` and then waits for its client to leave."""

    def __init__(self, num_events: int) -> None:
        self.num_events = num_events
        self.waiting = asyncio.Event()
        self.end: str | None = None

    async def __call__(self, scope, receive, send):
        for number in range(self.num_events):
            if number == 0:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        self.waiting.set()
        while (message := await receive())["type"] == "http.request":
            pass
        self.end = message["type"]
        await send({"type": "http.response.body", "body": b"for nobody"})


async def never():
    await asyncio.Event().wait()


@pytest.mark.parametrize("num_events", [0, 2])
def test_a_request_in_flight_is_ended_and_the_engine_told(num_events):
    sent = []

    async def send(message):
        sent.append(message)

    async def scenario():
        app = Streaming(num_events)
        shortage = Shortage(asyncio.get_running_loop())
        request = asyncio.create_task(EndInShortage(app, shortage)(POST, never, send))
        await app.waiting.wait()
        await asyncio.to_thread(shortage.set, True)
        await request
        assert app.end == "http.disconnect"

    asyncio.run(scenario())
    last = sent[-1]["body"]
    assert not sent[-1].get("more_body", False)
    if num_events:
        assert [message["type"] for message in sent].count("http.response.start") == 1
        event, done = last.decode().split("\n\n")[:2]
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503 and done == "data: [DONE]"
    else:
        assert sent[0]["status"] == 503 and b"retry-after" in dict(sent[0]["headers"])
        assert json.loads(last)["error"]["type"] == "ServiceUnavailableError"


def test_new_requests_are_refused_until_the_shortage_is_over_and_others_pass():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    async def status(guarded, method):
        sent = []

        async def send(message):
            sent.append(message)

        await guarded({**POST, "method": method}, never, send)
        return sent[0]["status"]

    async def scenario():
        shortage = Shortage(asyncio.get_running_loop())
        guarded = EndInShortage(app, shortage)
        found = [await status(guarded, "POST")]
        for is_stalled in (True, False):
            shortage.set(is_stalled)
            await asyncio.sleep(0)
            found += [await status(guarded, "POST"), await status(guarded, "GET")]
        return found

    assert asyncio.run(scenario()) == [200, 503, 200, 200, 200]


def test_what_the_app_raises_reaches_serve():
    async def app(scope, receive, send):
        raise KeyError("x")

    async def scenario():
        await EndInShortage(app, Shortage(asyncio.get_running_loop()))(POST, never, never)

    with pytest.raises(KeyError):
        asyncio.run(scenario())

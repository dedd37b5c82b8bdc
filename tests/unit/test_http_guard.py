"""The HTTP guard as plain ASGI: refusals, the shape of errors, and cancellation turned into http.disconnect."""

import asyncio
import json

import pytest

from deployments.http_guard import DisconnectOnCancel, OpenAIErrors, error_text, out_of_range_integer

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


def answering(status: int, body: bytes, content_type: bytes = b"application/json"):
    """An app that reads its whole request and gives a fixed answer; `bodies` records what it read."""
    bodies: list[bytes] = []

    async def app(scope, receive, send):
        body_read = b""
        while True:
            message = await receive()
            body_read += message.get("body", b"")
            if not message.get("more_body"):
                break
        bodies.append(body_read)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    app.bodies = bodies
    return app


def call(app, *chunks: bytes, method: str = "POST") -> tuple[int, bytes]:
    sent = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
        for index, chunk in enumerate(chunks or (b"",))
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(app({**SCOPE, "method": method}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_good_request_passes_unchanged():
    inner = answering(200, b'{"ok": 1}')
    assert call(OpenAIErrors(inner), b'{"a":', b" 1}") == (200, b'{"ok": 1}')
    assert inner.bodies == [b'{"a": 1}']


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b'{"detail":"Not Found"}'),
        (400, b'{"detail":[{"loc":"body"}]}'),
        (500, b"Internal Server Error"),
        (502, b""),
    ],
)
def test_foreign_errors_get_the_shape_of_openai(status, body):
    got, answer = call(OpenAIErrors(answering(status, body)), b"{}")
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, status)
    assert error["message"] and error["type"].endswith("Error") and error["param"] is None


def test_openai_errors_pass_unchanged():
    body = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'
    assert call(OpenAIErrors(answering(400, body)), b"{}") == (400, body)
    assert error_text(b'{"error":{"message":"","code":500}}', 500) == "Internal Server Error"


def test_errors_of_a_dead_engine_ask_to_try_again():
    body = b'{"error":{"message":"EngineCore died","type":"InternalServerError","param":null,"code":500}}'
    status, answer = call(OpenAIErrors(answering(500, body), lambda: True), b"{}")
    assert status == 503 and json.loads(answer)["error"]["type"] == "ServiceUnavailableError"
    assert call(OpenAIErrors(answering(500, body), lambda: False), b"{}") == (500, body)


def test_a_body_over_the_limit_is_refused_unread():
    inner = answering(200, b"{}")
    status, answer = call(OpenAIErrors(inner, max_body_bytes=10), b"12345678", b"90123")
    assert status == 413 and "larger than 10 bytes" in json.loads(answer)["error"]["message"]
    assert inner.bodies == []


def test_integers_beyond_64_bits_are_refused():
    inner = answering(200, b"{}")
    status, answer = call(OpenAIErrors(inner), b'{"top_k": 18446744073709551616}')
    assert status == 400 and "64-bit" in json.loads(answer)["error"]["message"]
    assert inner.bodies == []
    assert out_of_range_integer(b'{"a": [1, {"b": -9223372036854775809}]}') == -(2**63) - 1
    assert out_of_range_integer(b'{"seed": 9223372036854775807}') is None
    assert out_of_range_integer(b'{"prompt": "call 123456789012345678901234567890"}') is None
    assert out_of_range_integer(b"[" * 100_000 + b"1" * 30) is None


def test_cancelling_the_request_tells_the_app_that_the_client_left():
    seen = []

    async def app(scope, receive, send):
        await receive()
        message = await receive()
        seen.append(message["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def scenario():
        requests = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if not requests:
                await asyncio.Event().wait()
            return requests.pop()

        async def send(message):
            seen.append(message)

        task = asyncio.create_task(DisconnectOnCancel(app)(SCOPE, receive, send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert seen == ["http.disconnect"]


def test_an_exception_of_the_app_reaches_serve():
    async def app(scope, receive, send):
        raise KeyError("x")

    with pytest.raises(KeyError):
        call(DisconnectOnCancel(app))

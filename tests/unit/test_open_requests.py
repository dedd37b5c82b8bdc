"""When a process may end without cutting an answer off."""

import asyncio

import pytest

from deployments.open_requests import OpenRequests

HTTP = {"type": "http"}


def test_it_is_quiet_when_the_last_answer_has_been_out_for_a_while():
    async def main():
        asked, answered = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            asked.set()
            await answered.wait()

        requests = OpenRequests(app)
        request = asyncio.create_task(requests(HTTP, None, None))
        await asked.wait()
        assert not await requests.wait_for_quiet(0.02, limit_s=0.2)
        answered.set()
        await request
        assert not await requests.wait_for_quiet(10.0, limit_s=0.1), "it has just ended"
        assert await requests.wait_for_quiet(0.02, limit_s=10.0)

    asyncio.run(main())


def test_a_request_that_fails_is_no_longer_open():
    async def main():
        async def app(scope, receive, send):
            raise ZeroDivisionError

        requests = OpenRequests(app)
        with pytest.raises(ZeroDivisionError):
            await requests(HTTP, None, None)
        assert await requests.wait_for_quiet(0.01, limit_s=10.0)

    asyncio.run(main())


def test_lifespan_is_no_request():
    async def main():
        seen = []

        async def app(scope, receive, send):
            seen.append(scope["type"])
            assert await requests.wait_for_quiet(0.01, limit_s=10.0)

        requests = OpenRequests(app)
        await requests({"type": "lifespan"}, None, None)
        assert seen == ["lifespan"]

    asyncio.run(main())

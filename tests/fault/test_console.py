"""The web console in a real Chromium, on a running cluster: it shows what dies, and does what it is asked for."""

import os
import signal
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import open_page
from tests.serving import REPLICATED, Serving

pytestmark = pytest.mark.timeout(600)

SHOWN_WITHIN_MS = 2_000
STARTS_WITHIN_MS = 120_000


def replicas(page: Any, shard: int) -> list[str]:
    """Ids of those that the page shows as online."""
    found = page.locator(f"[data-shard='{shard}'] [data-state='online']").all()
    return [each.get_attribute("data-worker") for each in found]


def wait_for_replicas(page: Any, shard: int, count: int) -> None:
    online = page.locator(f"[data-shard='{shard}'] [data-state='online']")
    expect(online).to_have_count(count, timeout=STARTS_WITHIN_MS)


def act(page: Any, button: str, **fields: str) -> None:
    """Press an action's button, fill in its form, confirm, and wait until it is done."""
    page.locator(button).click()
    for name, value in fields.items():
        page.locator(f"dialog.action input[name={name}]").fill(value)
    page.locator("#confirm").click()
    page.locator("dialog.action li.good", has_text="Done.").wait_for(timeout=STARTS_WITHIN_MS)
    page.locator("dialog.action footer button", has_text="Close").click()


def test_a_killed_worker_is_seen_and_another_is_drained_from_the_page(replicated: Serving):
    with open_page() as page:
        page.goto(replicated.ask("console", args=dict(REPLICATED)))
        for shard in (0, 1):
            wait_for_replicas(page, shard, 2)
        assert page.url.endswith("/ops"), "the code is gone from the address"
        _a_killed_worker_is_seen_in_time(page, replicated)
        _a_drain_changes_the_epoch(page)
        act(page, "[data-shard='1'] [data-action=scale]", replicas="2")
        for shard in (0, 1):
            wait_for_replicas(page, shard, 2)
        _the_chat_answers(page)
        page.goto(page.url.split("#")[0] + "#/events")
        assert "is online" in page.locator("#stories li", has_text="Worker lost").first.inner_text()
        assert page.locator("#stories li", has_text="in the console: drain").count() == 1
        assert page.faults == []


def _a_killed_worker_is_seen_in_time(page: Any, serving: Serving) -> None:
    victim = replicas(page, 0)[0]
    shards = serving.ask("control", method="status")["shards"]
    pid = next(each["pid"] for each in shards[0]["replicas"] if each["id"] == victim)
    os.kill(pid, signal.SIGKILL)
    page.locator("#alerts", has_text=victim).wait_for(timeout=SHOWN_WITHIN_MS)
    assert victim not in replicas(page, 0)


def _a_drain_changes_the_epoch(page: Any) -> None:
    epoch = page.locator("#epoch").inner_text()
    victim = replicas(page, 1)[0]
    page.locator(f"[data-worker='{victim}']").click()
    act(page, "dialog.details [data-action=drain]")
    wait_for_replicas(page, 1, 1)
    assert victim not in replicas(page, 1) and page.locator("#epoch").inner_text() > epoch


def _the_chat_answers(page: Any) -> None:
    page.goto(page.url.split("#")[0] + "#/chat")
    page.locator("summary").click()
    page.get_by_label("Tokens at most").fill("5")
    page.get_by_label("Your question").fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.locator("#chat-note", has_text="first after").wait_for()

"""The web console in a real Chromium: on a running cluster, and on a simulated one of 512 workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.api_server import ApiServer
from tests.browser import open_page
from tests.serving import REPLICATED, Serving
from tests.simulated import ABOUT, SimulatedCluster

pytestmark = pytest.mark.timeout(600)

SHOWN_WITHIN_MS = 2_000
STARTS_WITHIN_MS = 120_000
PAGES = ("topology", "experts", "performance", "events", "model", "chat")


def replicas(page: Any, shard: int) -> list[str]:
    """Ids of those that the page shows as online."""
    found = page.locator(f"[data-shard='{shard}'] [data-state='online']").all()
    return [each.get_attribute("data-worker") for each in found]


def wait_for_replicas(page: Any, shard: int, count: int) -> None:
    script = f"document.querySelectorAll(\"[data-shard='{shard}'] [data-state='online']\").length === {count}"
    page.wait_for_function(script, timeout=STARTS_WITHIN_MS)


def act(page: Any, button: str, **fields: str) -> None:
    """Press an action's button, fill in its form, confirm, and wait until it is done."""
    page.locator(button).click()
    for name, value in fields.items():
        page.locator(f"dialog.action input[name={name}]").fill(value)
    page.locator("#confirm").click()
    page.locator("dialog.action li.good", has_text="Done.").wait_for(timeout=STARTS_WITHIN_MS)
    page.locator("dialog.action footer button", has_text="Close").click()


def test_a_killed_worker_is_seen_and_another_is_drained_from_the_page(serving: Serving):
    serving.deploy(REPLICATED)
    with open_page() as page:
        page.goto(serving.ask("console", args=dict(REPLICATED)))
        for shard in (0, 1):
            wait_for_replicas(page, shard, 2)
        assert page.url.endswith("/ops"), "the code is gone from the address"
        _a_killed_worker_is_seen_in_time(page, serving)
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
    assert victim not in replicas(page, 0) and "missing" in page.locator("#health").inner_text()
    page.locator("[data-shard='0'] .pending").wait_for()


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
    page.locator("#chat-note", has_text="+ 5 tokens").wait_for()


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[ApiServer, SimulatedCluster]]:
    cluster = SimulatedCluster(64, 8, experts=64)
    server = ApiServer(cluster, "0" * 64, "127.0.0.1", 0, tmp_path / "audit.log", {**ABOUT, "experts": 64})
    yield server, cluster
    server.close()


# Milliseconds of the longest task of the page's thread while views come in, beyond 50.
LONGEST_TASK = """() => new Promise((resolve) => {
    const found = [0];
    const take = (list) => found.push(...list.getEntries().map((each) => each.duration));
    new PerformanceObserver(take).observe({ type: "longtask" });
    setTimeout(() => resolve(Math.max(...found)), 4000);
})"""


def test_512_workers_are_shown_at_once_and_scroll_smoothly(large):
    server, cluster = large
    with open_page(viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
        page.goto(server.console_link())
        page.wait_for_function("document.querySelectorAll('[data-worker]').length === 512")
        assert page.evaluate(LONGEST_TASK) < 500
        victim = list(cluster.workers)[300]
        cluster.kill(victim)
        page.locator("#alerts", has_text=victim).wait_for(timeout=SHOWN_WITHIN_MS)
        page.get_by_role("button", name="By node").click()
        assert page.locator("[data-worker]").count() == 511
        page.get_by_role("searchbox").fill(list(cluster.workers)[7])
        page.wait_for_function("document.querySelectorAll('[data-worker]').length === 1")
        for name in PAGES:
            page.goto(f"{server.address}/ops#/{name}")
            page.locator("main h2").first.wait_for()
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(overflow) <= 0, f"{name} is wider than a phone"
        assert page.faults == []


def test_it_can_be_used_without_a_mouse_and_without_eyes(large):
    server, _ = large
    with open_page(color_scheme="light") as page:
        page.goto(server.console_link())
        page.locator("[data-worker]").first.wait_for()
        nameless = "[...document.querySelectorAll('button, a, input, select, textarea, [role=img]')].filter((each) =>"
        nameless += (
            " !(each.textContent.trim() || each.ariaLabel || each.labels?.length)).map((each) => each.outerHTML)"
        )
        for name in PAGES:
            page.goto(f"{server.address}/ops#/{name}")
            page.locator("main h2").first.wait_for()
            assert page.evaluate(nameless) == [], name
        page.goto(f"{server.address}/ops#/topology")
        page.locator("[data-worker]").first.focus()
        page.keyboard.press("Enter")
        page.locator("dialog.details").wait_for()
        page.keyboard.press("Escape")
        page.locator("dialog").wait_for(state="detached")
        page.goto(f"{server.address}/ops#/experts")
        page.wait_for_function("document.querySelector('#heat').width > 300")
        page.locator("#heat").focus()
        page.keyboard.press("ArrowDown")
        page.locator(".reading", has_text="Layer 1, expert 0").wait_for()


def test_without_a_link_there_is_nothing_to_see(large):
    server, _ = large
    with open_page() as page:
        page.goto(f"{server.address}/ops")
        page.get_by_text("This browser is not signed in").wait_for()
        link = server.console_link()
        page.goto("about:blank")
        page.goto(link)
        page.locator("[data-worker]").first.wait_for()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_text("This browser is not signed in").wait_for()
        page.goto("about:blank")
        page.goto(link)
        page.get_by_text("was used or is too old").wait_for()

"""The web console's page in a real Chromium, on a simulated cluster of 512 workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.api_server import ApiServer
from tests.browser import open_page
from tests.simulated import ABOUT, SimulatedCluster

SHOWN_WITHIN_MS = 2_000
PAGES = ("topology", "experts", "performance", "events", "model", "chat")


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

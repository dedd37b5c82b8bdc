"""A real Chromium without a window: Debian's, driven by playwright, with a profile of its own that is thrown away."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

CHROMIUM = "chromium"
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def open_page(**options: Any) -> Iterator[Any]:
    """A playwright Page; options are those of a browser context (viewport, color_scheme, ..).

    Its `faults` are what went wrong in the page: exceptions, console errors, and requests to any other place.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which(CHROMIUM)
    assert path, "these tests need a browser. Install it: apt install chromium"
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=path, args=_FLAGS, headless=True, **options
        )
        try:
            page = context.pages[0]
            page.faults = faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            page.on("request", lambda request: _note_stranger(request.url, faults))
            page.set_default_timeout(10_000)
            yield page
        finally:
            context.close()


def _note_stranger(url: str, faults: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "about:", "data:")):
        faults.append(f"asked {url}")

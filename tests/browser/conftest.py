"""A real headless Chromium that reads pages from disk, and a record of everything it asks for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

_FLAGS = (
    "--no-sandbox",  # root of a container has no user namespace to hide in
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"desktop": 1280, "phone": 390}


def chromium() -> str | None:
    """Path of a Chromium: what MANYLORA_CHROMIUM names, else the first that is installed."""
    named = os.environ.get("MANYLORA_CHROMIUM")
    return named or next((found for name in _NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """One look at a page."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture(scope="session")
def browser() -> Iterator[BrowserContext]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or name one in MANYLORA_CHROMIUM")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[test]'"
    )
    with sync_api.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=path, headless=True, args=list(_FLAGS)
        )
        yield context
        context.close()


@pytest.fixture
def look(browser: BrowserContext) -> Iterator[Any]:
    """`look(path, width=…, dark=…)` opens a file and returns what was `Seen`."""
    opened = []

    def open_page(path: Path, *, width: str = "desktop", dark: bool = False) -> Seen:
        page = browser.new_page()
        opened.append(page)
        seen = Seen(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.messages.append(message.text))
        page.on("pageerror", lambda error: seen.messages.append(str(error)))
        page.set_viewport_size({"width": WIDTHS[width], "height": 844})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto(path.as_uri())
        return seen

    yield open_page
    for page in opened:
        page.close()

"""The system's Chromium, driven by Playwright; tests skip where either is missing (`make test-ui` installs both)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For one module: while it is open, this thread has an event loop, which other tests run themselves."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (make test-ui)")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (make test-ui)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page of a user of their own: `open_page(url, width, theme)`. An error of a script fails the test."""
    faults: list[str] = []
    contexts: list[Any] = []

    def open_one(url: str, width: int = 1280, theme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"a script of data ran: {dialog.message}"))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not faults

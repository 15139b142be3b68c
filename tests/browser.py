"""A report in a real browser: what it says to the console, asks the network for, shows, and prints.

The browser is the one that is installed; none is ever downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pypdfium2
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = """() => Promise.all([...document.querySelectorAll('audio')].map(audio =>
    audio.readyState > 0 || audio.error || new Promise(done => {
        audio.addEventListener('loadedmetadata', done); audio.addEventListener('error', done); })))"""


@dataclass
class Visit:
    """An opened page, and what it complained about: to the console, as uncaught errors, and failed requests."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def installed_browser() -> Iterator[Browser]:
    """The browser of this machine; the test is skipped where there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed here (looked for {', '.join(NAMES)})")
    with sync_playwright() as playwright:
        # CI runs as root, which Chromium refuses in its sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, report: Path, width: int = 1280, height: int = 900) -> Iterator[Visit]:
    """A report at a size of window, in CSS pixels, with its sounds loaded."""
    page = browser.new_page(viewport={"width": width, "height": height})
    visit = Visit(page)
    page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("requestfailed", lambda request: visit.complaints.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: visit.requests.append(request.url))
    page.goto(report.resolve().as_uri())
    page.evaluate(READY)
    yield visit
    page.close()


def printed(visit: Visit) -> list[tuple[str, float]]:
    """The text of every page on paper, and how much of it is not white, from 0 to 1."""
    with pypdfium2.PdfDocument(visit.page.pdf(prefer_css_page_size=True)) as document:
        pages = [document[number] for number in range(len(document))]
        inks = [float((page.render(grayscale=True).to_numpy() < 250).mean()) for page in pages]
        return [(page.get_textpage().get_text_bounded(), ink) for page, ink in zip(pages, inks, strict=True)]

"""A report as people meet it: on a screen, on a phone, on paper, with sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from browser import Visit, installed_browser, opened, printed
from playwright.sync_api import Browser

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.report import (
    VERDICTS,
    Section,
    folded_table,
    html_table,
    lens_section,
    subtitle_of,
    write_report,
)

PHONE = dict(width=360, height=740)
CONTRAST = """() => {
    const painted = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    const said = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    return [...document.querySelectorAll('body *')].filter(said).map(
        element => [element.textContent.trim().slice(0, 40), getComputedStyle(element).color, painted(element)]);
}"""


@pytest.fixture(scope="module")
def report(toy: LALM, clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips through a lens, and whatever else a section can hold, in 25 sections."""
    samples = [
        Sample(clip.name, Prompt(clips=(clip,), answer="The sound file's animal is", attribute="animal"), truth)
        for clip, truth in zip(clips, ("dog", "cat", "dog"), strict=True)
    ]
    result = logit_lens(toy, samples, ("dog", "cat"), ["all", "audio", "attribute"])
    long = pd.DataFrame({"track": "Animal", "row": [f"row {index}" for index in range(96)]})
    wide = pd.DataFrame([{f"a column with a name {index}": f"0.{index} (0.10 to 0.90)" for index in range(14)}])
    sections = [
        lens_section(result, "A-title-without-any-space-that-is-too-long-for-a-phone", list(enumerate(clips))),
        *(Section(f"Finding {name}", (name,), verdict=name, group="Findings") for name in VERDICTS),
        Section("Long", ("a long table",), folded_table(long), group="Tables"),
        Section("Wide", ("a wide table",), html_table(wide), listing="x" * 300, caveat="wide", group="Tables"),
        *(Section(f"Section {index}", (f"paragraph {index}",), group="Rest") for index in range(19)),
    ]
    return write_report(tmp_path_factory.mktemp("browser") / "report.html", "A title", subtitle_of(result), sections)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with installed_browser() as running:
        yield running


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Visit]:
    with opened(browser, report) as visit:
        yield visit


@pytest.fixture
def phone(browser: Browser, report: Path) -> Iterator[Visit]:
    with opened(browser, report, **PHONE) as visit:
        yield visit


def test_nothing_is_complained_of_and_nothing_is_asked_for(visit: Visit, report: Path) -> None:
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.resolve().as_uri()]


def test_every_figure_is_drawn_and_has_words(visit: Visit) -> None:
    figures = visit.page.locator("img").evaluate_all("images => images.map(image => [image.naturalWidth, image.alt])")
    assert len(figures) == 4
    assert all(width > 0 and len(alt) > 20 for width, alt in figures)


def test_clips_are_as_long_as_they_are(visit: Visit, clips: list[Clip]) -> None:
    heard = visit.page.locator("audio").evaluate_all("sounds => sounds.map(sound => sound.duration)")
    assert heard == pytest.approx([clip.seconds for clip in clips], abs=0.03)  # Vorbis comes in blocks


@pytest.mark.parametrize("size", [PHONE, dict(width=768, height=1024), dict(width=1280, height=900)], ids=str)
def test_only_boxes_scroll_sideways(browser: Browser, report: Path, size: dict[str, int]) -> None:
    with opened(browser, report, **size) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        table = visit.page.get_by_role("group", name="Table of Wide")
        assert table.evaluate("box => box.scrollWidth > box.clientWidth && box.clientWidth < innerWidth")


def test_figures_on_a_phone_are_not_much_smaller_than_they_were_drawn(phone: Visit) -> None:
    shares = phone.page.locator("img").evaluate_all("images => images.map(i => i.clientWidth / i.naturalWidth)")
    assert min(shares) > 0.7


def test_contents_are_folded_on_a_phone_and_stay_in_sight_on_a_wide_screen(visit: Visit, phone: Visit) -> None:
    link = phone.page.get_by_role("link", name="Section 18")
    assert not link.is_visible()
    phone.page.get_by_text("Contents, 25 sections").click()
    link.click()
    assert phone.page.evaluate("location.hash") == "#s25"
    wide = visit.page.get_by_role("link", name="Long", exact=True)
    visit.page.get_by_role("heading", name="Section 18").scroll_into_view_if_needed()
    assert visit.page.evaluate("scrollY") > 1000
    box = wide.bounding_box()
    assert box is not None
    assert 0 <= box["y"] < 900


def test_a_screen_reader_meets_headings_in_order_and_named_regions(visit: Visit) -> None:
    levels = visit.page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(heading => heading.tagName)")
    assert levels == ["H1"] + ["H2"] * 25
    assert visit.page.evaluate("document.documentElement.lang") == "en"
    assert visit.page.get_by_role("navigation", name="Contents").count() == 1
    assert visit.page.get_by_role("region", name="Finding held").get_by_text("held", exact=True).count() >= 1
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.textContent") == "To the first section"


def test_words_stand_out_from_what_they_stand_on(visit: Visit, phone: Visit) -> None:
    """WCAG 2.2, level AA: a contrast of 4.5 for text of any size."""
    for words, ink, paper in [*visit.page.evaluate(CONTRAST), *phone.page.evaluate(CONTRAST)]:
        dark, light = sorted(luminance(colour) for colour in (ink, paper))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (words, ink, paper)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as WCAG defines it."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_on_paper_tables_are_open_and_no_page_is_empty(visit: Visit) -> None:
    pages = printed(visit)
    texts = [text for text, _ in pages]
    assert len(pages) > 3
    assert all(text.strip() or ink > 0.01 for text, ink in pages)
    assert all(f"row {index}" in "\n".join(texts) for index in range(96))
    of_table = [text for text in texts if "row 5" in text or "row 90" in text]
    assert len(of_table) > 1
    assert all("track" in text for text in of_table), "the header of a table stands on each of its pages"


def test_on_paper_there_is_nothing_to_click(visit: Visit) -> None:
    visit.page.emulate_media(media="print")
    assert visit.page.locator("section").first.is_visible()
    assert not any(part.is_visible() for part in visit.page.locator("nav, audio, .skip, .up").all())


def test_a_figure_is_not_cut_by_the_end_of_a_page(visit: Visit) -> None:
    """Print scales to the page, so each figure and its caption must fit on one."""
    assert visit.page.locator("figure").count() == 4
    visit.page.emulate_media(media="print")
    visit.page.set_viewport_size({"width": 680, "height": 1000})  # A4 without its margins, in CSS pixels
    kept = visit.page.locator("figure").evaluate_all("all => all.map(f => getComputedStyle(f).breakInside)")
    heights = visit.page.locator("figure").evaluate_all("all => all.map(f => f.offsetHeight)")
    assert kept == ["avoid"] * 4
    assert max(heights) < 1000

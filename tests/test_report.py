"""The report: one file, nothing from outside, words for every picture."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.report import Section, html_table, lens_section, picture, subtitle_of, write_report


class Page(HTMLParser):
    """Every tag of a page with its attributes, and whether tags close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(toy: LALM, clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> str:
    samples = [
        Sample(clip.name, Prompt(clips=(clip,), answer="The sound file's animal is", attribute="animal"), truth)
        for clip, truth in zip(clips, ("dog", "cat", "dog"), strict=True)
    ]
    result = logit_lens(toy, samples, ("dog", "cat"), ["audio", "attribute"])
    section = lens_section(result, "Animal <script>", [(0, clips[0]), (1, None)])
    path = write_report(tmp_path_factory.mktemp("r") / "deep" / "report.html", "A & B", subtitle_of(result), [section])
    return Path(path).read_text()


def test_everything_is_inside(page: str) -> None:
    sources = [
        attrs.get("src") or attrs.get("href") or "" for _, attrs in Page(page).tags if {"src", "href"} & set(attrs)
    ]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_every_picture_has_words(page: str) -> None:
    images = [attrs for tag, attrs in Page(page).tags if tag == "img"]
    assert len(images) == 3
    assert all(len(attrs["alt"] or "") > 20 for attrs in images)


def test_clips_can_be_played(page: str) -> None:
    (audio,) = [attrs for tag, attrs in Page(page).tags if tag == "audio"]
    assert (audio["src"] or "").startswith("data:audio/ogg;base64,")


def test_tags_are_balanced_and_words_are_escaped(page: str) -> None:
    assert Page(page).open == []
    assert "A &amp; B" in page
    assert "<script" not in page


def test_the_text_says_numbers_of_the_result(page: str) -> None:
    assert "Of 3 clips the model answers" in page
    assert "chance 50%" in page
    assert "Critical layer:" in page
    assert "3 clips are few" in page


def test_a_picture_closes_its_figure() -> None:
    figure = plt.figure()
    picture(figure, "nothing to see", "empty")
    assert not plt.fignum_exists(figure.number)


def test_a_page_without_figures(tmp_path: Path) -> None:
    table = html_table(pd.DataFrame({"a": [0.12345], "b": [None]}))
    path = write_report(tmp_path / "r.html", "t", "s", [Section("One", ("text",), table=table, listing="a < b")])
    assert "0.123" in path.read_text()
    assert "a &lt; b" in path.read_text()

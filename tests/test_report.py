"""The report: one file, nothing from outside, words for every picture."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.causal_sections import enhance_section, heads_section, knockout_section, patch_section
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.recipes.activation_patching import activation_patching
from audio_lens_plugin.recipes.attention_knockout import attention_knockout
from audio_lens_plugin.recipes.enhancement import enhance_sweep
from audio_lens_plugin.recipes.listening_heads import listening_heads
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.recipes.pairs import pairs_from
from audio_lens_plugin.report import (
    Section,
    example_pictures,
    folded_table,
    html_table,
    interval,
    lens_section,
    p_value,
    picture,
    subtitle_of,
    with_intervals,
    with_p,
    write_report,
)


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


def test_clips_can_be_played_under_their_figure(page: str) -> None:
    (place,) = [index for index, (tag, _) in enumerate(Page(page).tags) if tag == "audio"]
    (before, image), (_, audio), (after, _) = Page(page).tags[place - 1 : place + 2]
    assert (before, after) == ("img", "figcaption")
    assert (image["alt"] or "").startswith("noise_8000: probability of dog")
    assert (audio["src"] or "").startswith("data:audio/ogg;base64,")


def test_captions_tell_whose_seconds_these_are(page: str) -> None:
    assert page.count("Seconds are those of the clip. Its waveform lies over the positions that hear it.") == 1
    assert page.count("Seconds are those of the clip.") == 2, "one of the two examples came without its clip"


def test_a_model_without_time_says_so(clips: list[Clip]) -> None:
    desta = load("toy/desta2")
    samples = [Sample("one", Prompt(clips=(clips[1],), answer="The animal is"), "dog")]
    heard = example_pictures(logit_lens(desta, samples, ("dog", "cat"), ["audio"]), [(0, clips[1]), (0, None)])
    assert heard[0].caption.endswith("which keep no time. The waveform above them has its own seconds.")
    assert heard[1].caption.endswith("which keep no time.")
    (deaf,) = example_pictures(logit_lens(desta, samples, ("dog", "cat")), [(0, clips[1])])
    assert "time" not in deaf.caption


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


def test_sections_are_grouped_in_the_list_of_contents(tmp_path: Path) -> None:
    groups = ("", "Findings", "Findings", "Lens", "Findings")
    sections = [Section(f"Section {index}", group=group) for index, group in enumerate(groups, 1)]
    page = write_report(tmp_path / "r.html", "t", "s", sections).read_text()
    contents = page[page.index("<nav") : page.index("</nav>")]
    told = re.findall(r'class="group"[^>]*>(\w+)<|href="#(s\d)">(Section \d)<', contents)
    assert ["".join(entry) for entry in told] == [
        *("s1Section 1", "Findings", "s2Section 2", "s3Section 3", "Lens", "s4Section 4", "Findings", "s5Section 5")
    ]
    assert re.findall(r'<section id="(s\d)".*\n<h2[^>]*>(.*)<', page) == [
        (f"s{n}", f"Section {n}") for n in range(1, 6)
    ]


def test_a_verdict_is_a_word(tmp_path: Path) -> None:
    sections = [Section("One", verdict="did not hold"), Section("Two")]
    page = write_report(tmp_path / "r.html", "t", "s", sections).read_text()
    assert re.findall(r'<p class="verdict ([a-z-]+)">.*</span> (.*)</p>', page) == [("did-not-hold", "did not hold")]
    with pytest.raises(ValueError, match=r"Three: 'proved' is no verdict; choose one of held, did not hold, cannot be"):
        Section("Three", verdict="proved")


def test_a_long_table_is_folded_and_says_how_long_it_is() -> None:
    folded = folded_table(pd.DataFrame({"a": range(96)}))
    assert folded.startswith("<details><summary>Table, 96 rows</summary><table")
    assert folded.count("<td>") == 96


def test_numbers_for_people() -> None:
    assert interval(0.5, 0.25, 0.75) == "0.50 (0.25 to 0.75)"
    assert interval(-0.001, -0.2, 0.1, "+") == "+0.00 (-0.20 to +0.10)", "no number is minus nothing"
    assert interval(0.5, np.nan, np.nan) == "0.50"
    assert interval(np.nan, 0.1, 0.2) == "–"
    assert [p_value(p) for p in (0.04567, 0.00021, 1.0, np.nan)] == ["0.046", "0.00021", "1", "–"]
    frame = pd.DataFrame({"value": [0.5], "low": [0.25], "high": [0.75], "p": [np.nan], "q": [0.123]})
    shown = with_p(with_intervals(frame, "value"), "p", "q")
    assert shown.to_dict("records") == [{"value": "0.50 (0.25 to 0.75)", "p": "–", "q": "0.12"}]


def test_the_parts_of_a_section_stand_in_their_order(tmp_path: Path) -> None:
    figure = picture(plt.figure(), "nothing to see", "seen")
    section = Section(
        "Title",
        ("claim", "more"),
        "<table></table>",
        (figure,),
        "listed",
        "but",
        "held",
        summary="<table><tr></tr></table>",
    )
    page = write_report(tmp_path / "r.html", "t", "s", [section]).read_text()
    order = [
        "</h2>",
        "</span> held",
        'class="lead">claim<',
        "<p>more<",
        "<table><tr>",
        "<img",
        ">seen<",
        "listed",
        "<table></",
        ">but<",
    ]
    places = [page.index(mark) for mark in order]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def asked(clips: list[Clip]) -> list[Sample]:
    return [
        Sample(clip.name, Prompt(clips=(clip,), question="What animal?", answer="The animal is"), truth)
        for clip, truth in zip(clips, ("dog", "cat", "dog"), strict=True)
    ]


def check_section(section: Section, said: str, cells: list[str], figures: int) -> None:
    """Words with numbers, tables with these words in them, and a text for every picture that says what it shows."""
    assert said in section.text[0]
    assert re.search(r"\(.?\d\.\d\d to .?\d\.\d\d\)", section.text[0])
    assert all(f"<td>{cell}</td>" in (section.table or "") or f"<th>{cell}</th>" in section.table for cell in cells)
    assert len(section.figures) == figures
    assert all(picture.alt.startswith(f"{section.title}: ") and len(picture.alt) > 60 for picture in section.figures)
    assert "3 pairs are few" in section.caveat or "clips are few" in section.caveat


def test_a_section_on_patching(toy: LALM, asked: list[Sample]) -> None:
    result = activation_patching(
        toy, pairs_from(asked, "silence"), ("dog", "cat"), ["hook_resid_pre", "hook_mlp_out"], ["audio", "last", "all"]
    )
    section = patch_section(result, "Patched")
    check_section(section, "Most is recovered by patching", ["hook_mlp_out", "audio", "all", "1.00 (1.00 to 1.00)"], 2)
    assert " at hook_" in section.text[0]
    assert "patching all" not in section.text[0], "to patch everything says nothing"
    assert section.text[2].startswith("Grounding, ")
    assert "1.00 (1.00 to 1.00) at layer 0" in section.text[2]
    runs = (result.baseline("logit_diff", run) for run in ("clean", "corrupted"))
    assert f"ahead by {np.subtract(*runs).mean():.2f} (" in section.text[1]
    assert "not clearly ahead" in section.caveat  # noise: the toy cannot know the answer
    noised = activation_patching(
        toy, pairs_from(asked, "silence"), ("dog", "cat"), positions=["last"], direction="noise"
    )
    text = patch_section(noised, "Noised").text
    assert len(text) == 2
    assert text[0].startswith("Least is left by patching last at hook_resid_pre of layer 7: ")


def test_a_section_on_single_positions_has_a_line_for_each(toy: LALM, asked: list[Sample]) -> None:
    pairs = pairs_from(asked[:1], "silence")
    section = patch_section(activation_patching(toy, pairs, ("dog", "cat"), positions=["every"], layers=[0]), "Each")
    assert "<th>token</th>" in (section.table or "")
    assert (section.table or "").count("<tr") > 20


def test_a_section_on_knockout_names_the_control(toy: LALM, asked: list[Sample]) -> None:
    result = attention_knockout(toy, asked, ("dog", "cat"), layers=[0, 4])
    section = knockout_section(result, "Cut")
    check_section(section, "Most is lost when last cannot read audio", ["last → audio", "control", "keys"], 1)
    worst = result.effects().query("cut == 'keys'")["probability"].min()
    assert f"p(truth) changes by {worst:+.2f} (".replace("-", "−") in section.text[0]
    assert "As many other keys, drawn by chance: " in section.text[0]
    alone = attention_knockout(toy, asked, ("dog", "cat"), ["last", "question"], layers=[4], control=False)
    assert "drawn by chance" not in knockout_section(alone, "Cut").text[0]


def test_a_section_on_heads(asked: list[Sample]) -> None:
    eager = load("toy/qwen2-audio", attn_implementation="eager")
    result = listening_heads(eager, asked, ("dog", "cat"))
    section = heads_section(result, "Heads")
    first = result.ranked().iloc[0]
    check_section(section, f"without layer {first['layer']:.0f} head {first['head']:.0f}", ["effect", "difference"], 2)
    assert (section.table or "").count("<tr") == 11


def test_a_section_on_enhancement_tells_the_held_out_clips(toy: LALM, asked: list[Sample]) -> None:
    result = enhance_sweep(toy, asked, ("dog", "cat"), sources=[1], coefficients=[1.0])
    section = enhance_section(result, "Enhanced")
    line = result.held_out().iloc[0]
    check_section(section, f"On {line['samples']} held-out clips accuracy goes from {line['before']:.2f}", ["gain"], 2)
    assert str(result.chosen).replace(">", "&gt;") in (section.table or "")
    assert "they are no result" in section.figures[1].caption

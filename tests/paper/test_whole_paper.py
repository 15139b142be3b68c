"""The whole paper on every toy: every table has its numbers, and they are those of the recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import installed_browser, opened, printed
from playwright.sync_api import Browser

from audio_lens_plugin.datasets import toy_clips, toy_tracks
from audio_lens_plugin.loading import load, toys
from audio_lens_plugin.paper.compare import compare
from audio_lens_plugin.paper.design import Settings
from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.paper.run import run_paper
from audio_lens_plugin.paper.tables import TABLES
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.results import ResultError
from audio_lens_plugin.tracks import TRACKS

MAY_LACK = {
    "answers": {"said", "heard"},  # only where something was said, and named one label
    "curves": {"probability", "low", "high"},  # no clip is wrong, or none is right
    "critical_layers": {"layer", "low", "high"},  # undefined near chance
    "correlation": {"value", "p"},
    "attribute_share": {"share", "low", "high"},  # nothing at the last position
    "enhancement": {"relative"},  # nothing was right before
}

EXPLAINED_ABOVE = {"track", "form", "samples", "low", "high", "p", "p_of_all"}  # the guide says them of all tables


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run of every toy, made once."""
    folder = tmp_path_factory.mktemp("runs")
    settings = Settings(new_tokens=4)  # the length of free answers is a third of the time
    return {
        toy: run_paper(toy, toy_tracks(toy), folder / toy.split("/")[1], settings=settings).parent for toy in toys()
    }


@pytest.fixture(params=list(toys()))
def toy_and_run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> tuple[str, Path]:
    return request.param, runs[request.param]


def tables_of(run: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in (run / "tables").glob("*.parquet")}


def test_every_table_has_its_numbers(toy_and_run: tuple[str, Path]) -> None:
    toy, run = toy_and_run
    tables = tables_of(run)
    assert set(tables) == set(TABLES)
    for name, table in tables.items():
        whole = table[[column for column in table if column not in MAY_LACK.get(name, set())]]
        assert len(table) >= 4, name
        assert not whole.isna().any().any(), name
        assert not table.drop(columns=["relative"], errors="ignore").isna().all().any(), name
    layers = load(toy).n_layers
    last = tables["information"].query("span == 'last' and control == 'clip' and track == 'Animal'")
    assert len(last) == 12 * (layers + 1)
    assert len(tables["accuracy"].query("measure == 'labels'")) == 4 * 12 * 3
    assert len(tables["accuracy"].query("measure == 'free'")) == 4 * 12 * 2
    assert len(tables["critical_layers"]) == 4 * 12
    assert len(tables["enhancement_development"]) == 4 * layers * (layers - 1)
    assert set(tables["knockout"]["cut"]) == {"keys", "control"}
    assert {"audio", "question", "attribute", "answer", "last", "all"} == set(tables["patching"]["position"])


def test_the_guide_names_every_column_of_every_table(toy_and_run: tuple[str, Path]) -> None:
    _, run = toy_and_run
    guide = (Path(__file__).resolve().parents[2] / "docs" / "paper.md").read_text()
    for name, table in tables_of(run).items():
        (line,) = re.findall(rf"^\| `{name}` .*$", guide, flags=re.M)
        for column in set(table) - EXPLAINED_ABOVE:
            measured = re.sub(r"_(low|high)$", "", column)
            assert re.search(rf"\b{measured}\b", line), (name, column)


def test_the_numbers_are_those_of_the_recipe(toy_and_run: tuple[str, Path]) -> None:
    toy, run = toy_and_run
    tables, form = tables_of(run), "open+is+question"
    by_hand = logit_lens(load(toy), toy_clips(toy, "Emotion").samples(form), TRACKS["Emotion"].labels, ["attribute"])
    mine = {
        name: table.query(f"track == 'Emotion' and form == '{form}'")
        for name, table in tables.items()
        if "form" in table
    }
    (accuracy,) = mine["accuracy"].query("measure == 'labels' and control == 'clip'")["value"]
    assert accuracy == pytest.approx(by_hand.accuracy)
    (line,) = mine["critical_layers"].to_dict("records")
    assert line["layer"] == pytest.approx(by_hand.critical_layer().layer or np.nan, nan_ok=True)
    scores = by_hand.information()
    heard = mine["information"].query("control == 'clip'")
    for span in ("last", "attribute"):
        wanted = scores[scores["span"] == span]["score"]
        np.testing.assert_allclose(heard[heard["span"] == span]["score"], wanted)


def test_the_clip_matters_and_silence_is_chance(toy_and_run: tuple[str, Path]) -> None:
    _, run = toy_and_run
    accuracy = tables_of(run)["accuracy"].query("measure == 'labels' and form == 'reversed+is+question'")
    means = accuracy.groupby("control")["value"].mean()
    assert means["clip"] > means["silence"] + 0.2
    assert means["clip"] > means["no-audio"] + 0.2


def test_words_of_the_question_are_its_words(toy_and_run: tuple[str, Path]) -> None:
    _, run = toy_and_run
    words = tables_of(run)["question_words"].query("track == 'Animal' and form == 'open+is+question'")
    assert " ".join(words.drop_duplicates("word")["text"]).replace(" ?", "?") == TRACKS["Animal"].question


def test_the_folder_explains_itself(toy_and_run: tuple[str, Path]) -> None:
    toy, run = toy_and_run
    page = (run / "report.html").read_text()
    assert f"{toy}: the AudioLens paper" in page
    assert len(re.findall(r'<p class="verdict .*</span> (held|did not hold|cannot be told)</p>', page)) == 6
    alts = re.findall(r'<img[^>]* alt="([^"]*)"', page)
    assert len(alts) == 8 + 4 * 5 + page.count("data:audio/ogg")
    assert all(len(alt) > 30 for alt in alts)
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {"accuracy.svg", "accuracy.png", "knockout_Animal.svg"} <= figures
    assert len(figures) == 2 * (8 + 4 * 5)
    assert not RunFolder.open(run).missing


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with installed_browser() as running:
        yield running


OF_SECTIONS = """() => [...document.querySelectorAll('section')].map(section => ({
    title: section.querySelector('h2').innerText, lead: section.querySelector('.lead').innerText}))"""
OF_FIGURES = "all => all.map(image => [image.alt, image.naturalWidth, image.clientWidth, image.clientHeight])"
OF_SOUNDS = """all => all.map(sound => [sound.closest('section').querySelector('h2').innerText.split(':')[0],
    sound.closest('figure').querySelector('img').alt.split(':')[0], sound.duration])"""


def test_a_report_is_met_whole(toy_and_run: tuple[str, Path], browser: Browser) -> None:
    _, run = toy_and_run
    with opened(browser, run / "report.html") as visit:
        assert visit.complaints == []
        figures = visit.page.locator("img").evaluate_all(OF_FIGURES)
        assert len(figures) >= 8 + 4 * 5 + 4
        assert all(len(alt) > 30 and min(sizes) > 100 for alt, *sizes in figures)
        said = visit.page.inner_text("body") + " ".join(alt for alt, *_ in figures)
        assert not re.search(r"\bnan\b", said)
        pages = printed(visit)
    assert all(text.strip() and ink > 0.005 for text, ink in pages)
    assert len(pages) < 60, "tables are as long as layers, not as layers times prompt forms"


def test_a_report_does_not_scroll_sideways_on_a_phone(toy_and_run: tuple[str, Path], browser: Browser) -> None:
    _, run = toy_and_run
    with opened(browser, run / "report.html", width=360, height=740) as phone:
        assert phone.complaints == []
        assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_clips_of_a_report_can_be_played(toy_and_run: tuple[str, Path], browser: Browser) -> None:
    _, run = toy_and_run
    seconds = pd.read_parquet(run / "clips.parquet").set_index(["track", "clip"])["seconds"]
    with opened(browser, run / "report.html") as visit:
        heard = visit.page.locator("audio").evaluate_all(OF_SOUNDS)
    assert {track for track, _, _ in heard} == set(TRACKS)
    assert [duration for *_, duration in heard] == pytest.approx(
        [seconds[track, clip] for track, clip, _ in heard], abs=0.03
    )


def test_every_section_begins_with_a_short_claim_and_its_number(
    toy_and_run: tuple[str, Path], browser: Browser
) -> None:
    _, run = toy_and_run
    with opened(browser, run / "report.html") as visit:
        sections = visit.page.evaluate(OF_SECTIONS)
    for section in sections:
        assert re.search(r"\d", section["lead"]) or "single clips" in section["title"], section
        assert len(section["lead"]) < 170, section
        assert ";" not in section["lead"], section


def test_models_stand_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    report = compare(list(runs.values()), tmp_path / "compare")
    accuracy = pd.read_parquet(tmp_path / "compare" / "tables" / "accuracy.parquet")
    assert list(dict.fromkeys(accuracy["model"])) == list(runs)
    across = pd.read_parquet(tmp_path / "compare" / "tables" / "correlation.parquet")
    defined = pd.read_parquet(tmp_path / "compare" / "tables" / "critical_layers.parquet")["layer"].notna().sum()
    assert across.query("of == 'model x track x form' and measure == 'pearson'")["points"].item() == defined
    page = report.read_text()
    assert all(toy in page for toy in runs)
    assert "DIFFERENT clips" in page  # every toy has its own


def test_one_run_is_not_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="two runs or more"):
        compare([next(iter(runs.values()))], tmp_path)

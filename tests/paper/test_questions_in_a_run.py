"""Questions come through the same door: on their own, beside tracks, in Python and on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from paper.small import SETTINGS, TOY, four_clips, four_questions, table_bytes

from audio_lens_plugin.cli import main
from audio_lens_plugin.loading import load
from audio_lens_plugin.multiple_choice import questions
from audio_lens_plugin.paper.design import subjects_of, units
from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.paper.run import merge, run_paper
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.results import ResultError

NAME = "voices (2 options)"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def straight(table: Path) -> Path:
    return run_paper(TOY, questions(table), table.parent / "straight", settings=SETTINGS).parent


@pytest.fixture
def audio_lens(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command beside the table of questions; returns its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(table.parent)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["audio-lens", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        return int(exit_.value.code or 0), said.out, said.err

    return run


def of_paper(out: str, *more: str) -> list[str]:
    return [
        "paper",
        "--model",
        TOY,
        "--questions",
        "voices.json",
        "--seed",
        "3",
        "--batch-size",
        "2",
        "--out",
        out,
        *more,
    ]


def read(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / "tables" / f"{name}.parquet")


def test_questions_alone_get_every_analysis(straight: Path) -> None:
    tables = {path.stem: pd.read_parquet(path) for path in (straight / "tables").glob("*.parquet")}
    assert len(tables) == 14, "all but the words of the question: each clip has its own"
    asked = {name: set(table["form"]) for name, table in tables.items() if "form" in table}
    assert asked.pop("answers") == asked.pop("accuracy") == {"letters", "asked"}
    assert all(forms == {"letters"} for forms in asked.values())
    assert all(set(table["track"]) == {NAME} for name, table in tables.items() if name != "correlation")
    page = (straight / "report.html").read_text()
    assert page.count("data:audio/ogg") in (1, 2)


def test_the_restricted_answers_are_those_of_the_lens(straight: Path, table: Path) -> None:
    (asked,) = questions(table).values()
    by_hand = logit_lens(load(TOY), asked.samples("letters"), ("A", "B")).samples.set_index("sample")["answer"]
    answers = read(straight, "answers").query("form == 'letters' and control == 'clip'").set_index("clip")["answer"]
    assert answers.to_dict() == by_hand.to_dict()


def test_free_answers_are_heard_by_the_words_of_their_own_options(straight: Path, table: Path) -> None:
    (asked,) = questions(table).values()
    options = {name: question.options for name, question in zip(asked.names, asked.questions, strict=True)}
    answers = read(straight, "answers").query("form == 'asked' and control == 'clip'")
    heard = answers.dropna(subset=["heard"])
    assert len(heard) > 0
    for _, line in heard.iterrows():
        assert options[line["clip"]]["AB".index(line["heard"])] in line["said"].split()


def test_questions_about_one_clip_are_on_one_side_of_the_split(straight: Path) -> None:
    clips = RunFolder.open(straight).clips
    assert clips["group"].duplicated().sum() == 1
    assert clips["clip"].is_unique


def test_beside_tracks_questions_are_only_asked(table: Path) -> None:
    track, asked = subjects_of({**four_clips(), **questions(table)})
    assert (track.causal, asked.causal) == ("reversed+is+question", None)
    ran = {(unit.experiment, unit.form, unit.control) for unit in units([asked], 2)}
    assert ran == {
        *(("lens", "letters", control) for control in ("clip", "silence", "no-audio")),
        *(("free", "asked", control) for control in ("clip", "silence")),
    }


def test_other_clips_are_not_played_as_those_of_the_run(straight: Path) -> None:
    before = (straight / "report.html").read_bytes()
    with pytest.raises(ResultError, match="was run on other clips than these"):
        merge([straight], four_clips())
    assert (straight / "report.html").read_bytes() == before


def test_a_dry_run_tells_what_a_run_takes_and_keeps_what_it_measured(audio_lens: Any, table: Path) -> None:
    code, said, _ = audio_lens(*of_paper("dry", "--dry-run", "--shard", "1/2"))
    assert code == 0
    run = RunFolder.open(table.parent / "dry")
    assert all(experiment in said for experiment in ("lens", "free", "knockout", "patching", "enhancement"))
    assert f"{len(run.missing)} of {len(run.units)} batches are missing" in " ".join(said.split())
    assert len(run.units) - len(run.missing) == 2 * 5, "two batches of every experiment"
    assert not (run.path / "report.html").exists()


def test_shards_on_the_command_line_end_in_the_same_tables(audio_lens: Any, table: Path, straight: Path) -> None:
    for share in ("2/2", "1/2"):
        code, said, errors = audio_lens(*of_paper("shards", "--shard", share))
        assert (code, said.strip()) == (0, "shards")
        assert f"shard {share} is finished; when all are: audio-lens merge shards" in errors
    code, said, _ = audio_lens("merge", "shards", "--questions", "voices.json")
    assert (code, said.strip()) == (0, "shards/report.html")
    mine, others = (table_bytes(run, tables=14) for run in (straight, table.parent / "shards"))
    assert mine == others
    code, said, _ = audio_lens("compare", "straight", "shards", "--out", "beside")
    assert (code, said.strip()) == (0, "beside/report.html")
    page = (table.parent / "beside" / "report.html").read_text()
    assert all(f"{TOY} ({name})" in page for name in ("straight", "shards"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper", "--model", "a/model", "--out", "x"], "name the clips: --sakura FOLDER or --questions FILE"),
        (["paper", "--model", TOY, "--questions", "none.json", "--out", "x"], "none.json: there is no such file."),
        (["paper", "--model", TOY, "--sakura", "nowhere", "--out", "x"], "nowhere: no SAKURA track is in it"),
        (of_paper("x", "--shard", "one"), "--shard takes i/n, for example 1/4, not 'one'."),
        (of_paper("x", "--shard", "3/2"), "shard 3/2: the first number counts from 1 to the second."),
        (["merge", "nowhere"], "nowhere holds no run"),
        (["compare", "straight"], "two runs or more can be compared."),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(
    audio_lens: Any, straight: Path, arguments: list[str], message: str
) -> None:
    code, said, errors = audio_lens(*arguments)
    assert (code, said) == (1, "")
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not Path("x").exists()


def test_a_saved_dataset_of_the_hub_is_a_table_too(audio_lens: Any, table: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    rows = pd.read_json(table)
    audio = [str(table.parent / name) for name in rows["audio_id"]]
    columns = {"audio": audio, "question": rows["question"], "choices": rows["choices"], "answer": rows["answer"]}
    saved = datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})
    saved.cast_column("audio", datasets.Audio()).save_to_disk(str(table.parent / "saved"))
    code, _, errors = audio_lens(
        "paper", "--model", TOY, "--questions", "saved", "--batch-size", "2", "--out", "hub", "--shard", "1/9"
    )
    assert code == 0, errors
    (subject,) = RunFolder.open(table.parent / "hub").identity.subjects
    assert (subject.name, subject.clips, subject.labels) == ("questions (2 options)", 4, ("A", "B"))

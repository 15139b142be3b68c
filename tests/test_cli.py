"""The command line as a user meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio_lens_plugin.cli import main

COUNT = 10


def audio_lens(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "audio_lens_plugin.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten noises and a table of them, half of them called male."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(1)
    for index in range(COUNT):
        soundfile.write(folder / f"{index}.wav", 0.1 * random.normal(size=4_000 + 800 * index), 16_000)
    table = pd.DataFrame({"file": [f"{index}.wav" for index in range(COUNT)], "sex": ["male", "female"] * (COUNT // 2)})
    table.to_csv(folder / "clips.csv", index=False)
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process, in the folder of clips; returns its exit code and what it told as an error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["audio-lens", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), capsys.readouterr().err

    return run


def lens(folder: Path, out: str, *more: str) -> list[str]:
    return ["run", "lens", "--data", "table:clips.csv", "--label", "sex", "--track", "Gender", "--out", out, *more]


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    done = audio_lens(*lens(folder, "straight", "--batch-size", "1", "--positions", "last,attribute,audio"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "straight/report.html"
    return folder / "straight"


def test_a_run_leaves_tables_figures_and_a_report(straight: Path) -> None:
    for name in ("report.html", "logit_lens.png", "logit_lens.svg", "information.csv", "curves.csv"):
        assert (straight / name).stat().st_size > 500, name
    header = json.loads((straight / "logit_lens" / "logit_lens.json").read_text())
    assert header["model"] == "toy/qwen2-audio"
    assert header["form"] == "open+is"
    assert header["labels"] == ["male", "female"]
    lens_table = pd.read_parquet(straight / "logit_lens" / "lens.parquet")
    assert lens_table["sample"].nunique() == COUNT
    assert set(lens_table["span"]) == {"last", "attribute", "audio"}


def test_a_killed_run_goes_on_and_ends_with_the_same_tables(folder: Path, straight: Path) -> None:
    arguments = lens(folder, "killed", "--batch-size", "1", "--positions", "last,attribute,audio")
    process = subprocess.Popen(
        [sys.executable, "-m", "audio_lens_plugin.cli", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = folder / "killed" / "parts"
    deadline = time.monotonic() + 300
    while len(list(parts.glob("[!.]*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("[!.]*")}
    assert len(finished) >= 2
    done = audio_lens(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    for name, changed in finished.items():
        assert (parts / name).stat().st_mtime_ns == changed, "a finished batch was computed again"
    for name in ("information.csv", "curves.csv", "logit_lens/lens.parquet", "logit_lens/partition.parquet"):
        assert (folder / "killed" / name).read_bytes() == (straight / name).read_bytes(), name


def test_an_interrupted_run_says_where_to_go_on(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "audio_lens_plugin.cli", *lens(folder, "stopped", "--batch-size", "1")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list((folder / "stopped" / "parts").glob("[!.]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal reached it")
    assert process.returncode == 130
    assert "the same command goes on from there" in errors


def test_a_prompt_is_shown_with_every_position_labelled(folder: Path) -> None:
    done = audio_lens("show", "9.wav", "--question", "What animal makes the sound?", "--answer", "It is a", cwd=folder)
    assert done.returncode == 0, done.stderr
    for piece in ("audio[0]", "0.00-0.68 s", "<|AUDIO|> × 17", "question", "answer"):
        assert piece in done.stdout


def test_models_lists_families_and_toys(folder: Path) -> None:
    shown = audio_lens("models", cwd=folder).stdout
    for piece in ("qwen2_audio", "Qwen/Qwen2-Audio-7B-Instruct", "toy/qwen2-audio", "real weights not run"):
        assert piece in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing.wav"], "nothing.wav: there is no such file."),
        (["show", "clips.csv"], "clips.csv: cannot be read as audio"),
        (["show", "0.wav", "--model", "toy/none"], "there is no 'toy/none' on the shelf"),
        (["demo", "--model", "some/model"], "the demo runs on toys"),
        (["run", "lens", "--data", "sakura:nowhere/Animal", "--out", "x"], "metadata.csv: there is no such file."),
        (["run", "lens", "--data", "clips.csv", "--out", "x"], "neither sakura:FOLDER/TRACK nor table:FILE"),
        (["run", "lens", "--data", "table:clips.csv", "--out", "x"], "a table needs --track"),
        (["run", "lens", "--data", "table:clips.csv", "--label", "sex", "--track", "Gender", "--form", "loud",
          "--out", "x"], "unknown prompt form 'loud'"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_non_zero_exit(inside, arguments: list[str], message: str) -> None:
    code, errors = inside(*arguments)
    assert code == 1
    lines = [line for line in errors.splitlines() if line.startswith("audio-lens: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors


def test_a_missing_clip_is_told_with_its_row_before_the_run(folder: Path, inside) -> None:
    table = pd.read_csv(folder / "clips.csv")
    table.loc[3, "file"] = "lost.wav"
    table.to_csv(folder / "broken.csv", index=False)
    code, errors = inside(
        "run", "lens", "--data", "table:broken.csv", "--label", "sex", "--track", "Gender", "--out", "b"
    )
    assert code == 1
    assert "row 4: lost.wav" in errors
    assert not (folder / "b").exists()


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = audio_lens("show", "nothing.wav", "--debug", cwd=folder)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_an_own_track_comes_from_a_file(folder: Path) -> None:
    track = {
        "name": "Voice", "attribute": "voice", "labels": ["male", "female"], "question": "Whose voice is it?",
        "open": "The voice", "reversed": "The sort of voice",
    }  # fmt: skip
    (folder / "voice.json").write_text(json.dumps(track))
    arguments = [
        "run",
        "lens",
        "--data",
        "table:clips.csv",
        "--label",
        "sex",
        "--track",
        "voice.json",
        "--out",
        "voice",
    ]
    done = audio_lens(*arguments, "--form", "reversed+is+options", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "voice" / "logit_lens" / "rows.parquet")
    assert rows.loc[rows["span"] == "attribute", "token"].str.strip().str.endswith(("voice", "e")).all()

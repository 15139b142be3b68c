"""The command line as a user meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    """Runs a command here, in the folder of clips; returns its exit code, its errors, and its output if asked."""

    def run(*arguments: str, output: bool = False) -> tuple[Any, ...]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["audio-lens", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        code = int(exit_.value.code or 0)
        return (code, said.err, said.out) if output else (code, said.err)

    return run


def on_clips(experiment: str, out: str, *more: str) -> list[str]:
    return ["run", experiment, "--data", "table:clips.csv", "--label", "sex", "--track", "Gender", "--out", out, *more]


def lens(folder: Path, out: str, *more: str) -> list[str]:
    return on_clips("lens", out, *more)


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


CAUSAL = {
    "patch": (
        ["--corrupted", "other", "--how", "resample", "--positions", "audio,last,all", "--layers", "0,7"],
        ["activation_patching/activation_patching.json", "recovered.csv", "hook_resid_pre.png", "hook_resid_pre.svg"],
        "Most is recovered by patching",
    ),
    "knockout": (
        ["--window", "8", "--table", "--form", "open+is+question", "--how", "zero"],
        ["attention_knockout/attention_knockout.json", "knockout_table/attention_knockout.json",
         "attention_knockout.csv", "knockout_table.csv", "attention_knockout.png", "knockout_table.svg"],
        "Most is lost when last cannot read audio",
    ),
    "heads": (
        [],
        ["listening_heads/listening_heads.json", "heads.csv", "heads_effect.png", "heads_mass.svg"],
        "Most is lost without layer",
    ),
    "enhance": (
        ["--coefficients", "1", "--how", "average", "--choose-by", "information"],
        ["enhancement/enhancement.json", "held_out.csv", "development.csv", "held_out.png", "development.svg"],
        "held-out clips accuracy goes from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("experiment", CAUSAL)
def test_a_causal_run_leaves_tables_figures_and_a_report_and_goes_on(folder: Path, inside, experiment: str) -> None:
    options, files, summary = CAUSAL[experiment]
    arguments = on_clips(experiment, experiment, "--batch-size", "5", *options)
    code, _, said = inside(*arguments, output=True)
    assert code == 0
    assert summary in said.splitlines()[-2]
    assert said.splitlines()[-1] == f"{experiment}/report.html"
    for name in (*files, "report.html"):
        assert (folder / experiment / name).stat().st_size > 50, name
    assert "Gender: " in (folder / experiment / "report.html").read_text()
    parts = {path: path.stat().st_mtime_ns for path in (folder / experiment / "parts").glob("[!.]*")}
    tables = {path: path.read_bytes() for path in (folder / experiment).glob("*.csv")}
    assert len(parts) >= 2
    assert inside(*arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "a finished batch was computed again"
    assert {path: path.read_bytes() for path in tables} == tables


def test_what_is_asked_for_on_the_command_line_is_what_runs(folder: Path, inside) -> None:
    arguments = ["--direction", "noise", "--site", "hook_mlp_out,attn.hook_z", "--layers", "1,3", "--positions", "last"]
    code, errors = inside(*on_clips("patch", "noised", *arguments))
    assert code == 0, errors
    header = json.loads((folder / "noised/activation_patching/activation_patching.json").read_text())
    wanted = {"direction": "noise", "sites": ["hook_mlp_out", "attn.hook_z"], "layers": [1, 3], "positions": ["last"]}
    assert {name: header["options"][name] for name in wanted} == wanted
    assert header["form"] == "open+is"
    recovered = pd.read_csv(folder / "noised" / "recovered.csv")
    assert list(zip(recovered["site"], recovered["layer"], strict=True)) == [
        (site, layer) for site in wanted["sites"] for layer in wanted["layers"]
    ]
    for name in ("hook_mlp_out.png", "attn_hook_z.png"):
        assert (folder / "noised" / name).exists()


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
        ([*on_clips("patch", "x"), "--direction", "sideways"], "--direction 'sideways' is none of: denoise, noise."),
        ([*on_clips("patch", "x"), "--layers", "one"], "--layers takes whole numbers with commas between them"),
        ([*on_clips("patch", "x"), "--corrupted", "thunder"], "'thunder' is no kind of corruption"),
        ([*on_clips("patch", "x"), "--site", "hook_soul"], "'hook_soul' cannot be patched"),
        ([*on_clips("knockout", "x"), "--how", "gently"], "--how 'gently' is none of: mask, zero, spread."),
        ([*on_clips("heads", "x"), "--keys", "question"], "question"),
        ([*on_clips("enhance", "x"), "--choose-by", "luck"], "--choose-by 'luck' is none of: accuracy, information."),
        ([*on_clips("enhance", "x"), "--coefficients", "1;2"], "--coefficients takes numbers with commas between them"),
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

"""Every code block of the README is run: Python as it stands, shell commands one by one.

`make` lines are run dry (`make -n`): running them here would start this test again. `audio-lens` lines run in a folder
that has what they name.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from documents import blocks, program

from audio_lens_plugin.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)


def commands() -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ") for line in lines]


def test_every_block_is_of_a_kind_that_is_run_here() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "console"}


def test_the_python_of_the_readme_runs_as_one_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "readme.py"
    script.write_text(program(README))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert (tmp_path / "lens.png").stat().st_size > 1000
    assert names["z"].shape[:2] == names["batch"].inputs["input_ids"].shape
    assert names["result"].critical_layer() is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that the README's commands name."""
    random = np.random.default_rng(2)
    animals = tmp_path / "SAKURA" / "data" / "Animal" / "audio"
    animals.mkdir(parents=True)
    for path in (tmp_path / "clip.wav", animals / "a.wav", animals / "b.wav"):
        soundfile.write(path, 0.1 * random.normal(size=8_000), 16_000)
    table = pd.DataFrame({"file": ["a.wav", "b.wav"], "attribute_label": ["dog", "cat"]})
    table.to_csv(animals.parent / "metadata.csv", index=False)
    soundfile.write(tmp_path / "other.wav", 0.1 * random.normal(size=8_000), 16_000)
    asked = {"question": "What is heard?", "options": "(A) noise (B) a dog", "answer": "noise"}
    table = pd.DataFrame([{"file": file, **asked} for file in ("clip.wav", "other.wav")])
    table.to_json(tmp_path / "questions.json", orient="records")
    pd.DataFrame({"file": ["clip.wav"], "who": ["male"]}).to_csv(tmp_path / "clips.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "audio-lens"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code


def test_every_relative_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_family_and_toy_is_in_the_table() -> None:
    from audio_lens_plugin.loading import families, toys

    for name in [repo for family in families().values() for repo in family.repo_ids] + list(toys()):
        assert f"`{name}`" in README, name

"""A run that is killed again and again loses at most a batch each time and ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from paper.small import SETTINGS, TOY, four_clips, table_bytes

from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.paper.run import run_paper

KILLS = 20


def run(out: Path) -> None:
    run_paper(TOY, four_clips(), out, settings=SETTINGS)


def finished(out: Path) -> set[Path]:
    if not (out / "run.json").is_file():
        return set()
    opened = RunFolder.open(out)
    return {opened.part(unit) for unit in opened.units if opened.part(unit).is_dir()}


def every_file_can_be_read(out: Path) -> None:
    for path in out.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out)
    return out


def test_twenty_kills_at_random_moments_lose_at_most_a_batch_each(straight: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    before: set[Path] = set()
    for _ in range(KILLS):
        process = get_context("fork").Process(target=run, args=(out,))
        process.start()
        assert process.pid is not None
        while process.is_alive() and finished(out) <= before:  # it has begun to work
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        every_file_can_be_read(out)
        now = finished(out)
        assert before < now, "what was finished stays, and every start gets further"
        before = now
    assert before < finished(straight) or len(before) < len(RunFolder.open(straight).units)
    started = {path: path.stat().st_mtime_ns for path in before}
    run(out)
    assert {path: path.stat().st_mtime_ns for path in before} == started, "what was finished was not run again"
    assert table_bytes(out) == table_bytes(straight)
    assert not list(out.rglob(".*")), "nothing half written is left"

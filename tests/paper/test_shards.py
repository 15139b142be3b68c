"""Shards in any order, in one folder or in several, on several devices: the same tables to the last byte."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from paper.small import SETTINGS, TOY, four_clips, table_bytes

from audio_lens_plugin.paper.folder import RunFolder
from audio_lens_plugin.paper.run import merge, run_paper
from audio_lens_plugin.results import ResultError


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run_paper(TOY, four_clips(), out, settings=SETTINGS)
    return out


def shard(out: Path, i: int, n: int) -> Path:
    return run_paper(TOY, four_clips(), out, settings=SETTINGS, shard=(i, n))


def test_shards_in_one_folder_in_any_order_end_in_the_same_tables(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for i in (3, 1):
        assert shard(out, i, 3) == out
    with pytest.raises(
        ResultError, match=r"batches are missing, the first is lens of Gender.*the same command without"
    ):
        merge([out])
    shard(out, 2, 3)
    report = merge([out], four_clips())
    assert table_bytes(out) == table_bytes(straight)
    pages = [re.sub('data:audio/ogg;base64,[^"]*', "", path.read_text()) for path in (report, straight / "report.html")]
    assert pages[0] == pages[1], "all but the sound, whose container carries a number drawn by chance"


def test_shards_in_folders_of_their_own_are_merged_into_the_first(straight: Path, tmp_path: Path) -> None:
    folders = [shard(tmp_path / f"of {i}", i, 2) for i in (1, 2)]
    merge(folders)
    assert table_bytes(folders[0]) == table_bytes(straight)
    assert RunFolder.open(folders[1]).missing, "the second keeps only its own"


def test_shards_are_equal_shares_and_together_everything(straight: Path) -> None:
    units = RunFolder.open(straight).units
    shares = [units[i::7] for i in range(7)]
    assert sorted((unit for share in shares for unit in share), key=units.index) == units
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_devices_end_in_the_same_tables(straight: Path, tmp_path: Path) -> None:
    run_paper(TOY, four_clips(), tmp_path / "run", settings=SETTINGS, devices=["cpu", "cpu"])
    assert table_bytes(tmp_path / "run") == table_bytes(straight)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="toy/nothing"):
        run_paper("toy/nothing", four_clips(), tmp_path / "run", devices=["cpu", "cpu"])


@pytest.mark.parametrize(("i", "n"), [(0, 2), (3, 2), (-1, 2)])
def test_a_shard_that_does_not_exist(tmp_path: Path, i: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"shard {i}/{n}: the first number counts from 1"):
        shard(tmp_path / "run", i, n)


def test_a_folder_of_another_run_is_refused(straight: Path) -> None:
    before = table_bytes(straight)
    with pytest.raises(ResultError, match="is a run of something else: it differs in settings, split"):
        run_paper(TOY, four_clips(), straight, settings=replace(SETTINGS, seed=4))
    other_clips = four_clips()
    other_clips["Gender"] = replace(other_clips["Gender"], labels=("male",) * 4)
    with pytest.raises(ResultError, match="it differs in data"):
        run_paper(TOY, other_clips, straight, settings=SETTINGS)
    assert table_bytes(straight) == before


def test_shards_of_different_runs_are_not_merged(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    run_paper(TOY, four_clips(), out, settings=replace(SETTINGS, window=1), shard=(1, 50))
    with pytest.raises(ResultError, match="differs in settings"):
        merge([straight, out])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ResultError, match="holds something that is no run"):
        run_paper(TOY, four_clips(), tmp_path, settings=SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_too_few_clips_are_refused_before_anything_runs(tmp_path: Path) -> None:
    clips = four_clips()["Gender"]
    one = replace(clips, **{name: getattr(clips, name)[:1] for name in ("names", "sources", "labels")})
    with pytest.raises(
        ValueError, match=r"1 clips \(or speakers\) with development=0.5 leave one side of the split empty"
    ):
        run_paper(TOY, {"Gender": one}, tmp_path / "run", settings=SETTINGS)
    assert not (tmp_path / "run").exists()


def test_another_seed_gives_other_intervals_from_the_same_parts(straight: Path, tmp_path: Path) -> None:
    run_paper(TOY, four_clips(), tmp_path / "run", settings=replace(SETTINGS, seed=4))
    mine, other = (pd.read_parquet(path / "tables" / "information.parquet") for path in (straight, tmp_path / "run"))
    pd.testing.assert_series_equal(mine["score"], other["score"])
    assert not mine["low"].equals(other["low"])


def test_a_run_says_what_it_is_of(straight: Path) -> None:
    said = json.loads((straight / "run.json").read_text())
    assert said["model"] == TOY
    assert said["settings"]["seed"] == 3
    assert said["dtype"] == "float32"
    assert said["attention"] == "sdpa"
    assert {"torch", "nnsight", "transformers", "transformer-lens"} <= set(said["versions"])
    assert len(said["subjects"][0]["forms"]) == 12
    assert "speaker" in said["split"]

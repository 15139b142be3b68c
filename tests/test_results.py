"""A result comes back as it was saved, appears whole or not at all, and its intervals are honest."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from audio_lens_plugin.results import (
    Header,
    ResultError,
    bootstrap_mean,
    bootstrap_ratio,
    load_tables,
    mcnemar,
    paired_difference,
    same_header,
    save_tables,
)

HEADER = Header(
    recipe="logit_lens",
    model="toy/qwen2-audio",
    revision=None,
    weights="0123abcd",
    dtype="float32",
    attention="sdpa",
    form="open+is",
    labels=("dog", "猫"),
    options={"positions": ["last"], "top_k": 0, "truncate": False},
    versions={"torch": "2.7.0"},
)
TABLES = {
    "curves": pd.DataFrame({"layer": [0, 1], "score": [0.25, float("nan")], "span": ["last", "spoken language"]}),
    "top": pd.DataFrame({"word": pd.Series([], dtype=str), "rank": pd.Series([], dtype="int64")}),
}


def test_a_header_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert load_tables(save_tables(tmp_path / "run", HEADER, TABLES), "logit_lens")[0] == HEADER


@pytest.mark.parametrize("name", TABLES)
def test_a_table_comes_back_as_it_was_saved(tmp_path: Path, name: str) -> None:
    _, tables = load_tables(save_tables(tmp_path / "run", HEADER, TABLES), "logit_lens")
    pd.testing.assert_frame_equal(tables[name], TABLES[name])


def test_a_table_comes_back_without_its_index(tmp_path: Path) -> None:
    filtered = TABLES["curves"].iloc[::-1]
    _, tables = load_tables(save_tables(tmp_path / "run", HEADER, {"curves": filtered}), "logit_lens")
    pd.testing.assert_frame_equal(tables["curves"], filtered.reset_index(drop=True))


def test_a_result_is_one_json_and_one_parquet_per_table(tmp_path: Path) -> None:
    folder = save_tables(tmp_path / "run", HEADER, TABLES)
    assert sorted(path.name for path in folder.iterdir()) == ["curves.parquet", "logit_lens.json", "top.parquet"]


def test_the_header_can_be_read_by_eye(tmp_path: Path) -> None:
    text = (save_tables(tmp_path / "run", HEADER, TABLES) / "logit_lens.json").read_text(encoding="utf-8")
    assert '\n    "猫"\n' in text


def test_folders_above_a_result_are_made(tmp_path: Path) -> None:
    assert save_tables(tmp_path / "a" / "b" / "run", HEADER, TABLES).is_dir()


def test_a_new_result_leaves_nothing_of_the_one_it_replaces(tmp_path: Path) -> None:
    save_tables(tmp_path / "run", HEADER, TABLES)
    save_tables(tmp_path / "run", replace(HEADER, form="reversed"), {"curves": TABLES["curves"]})
    header, tables = load_tables(tmp_path / "run", "logit_lens")
    assert (header.form, list(tables)) == ("reversed", ["curves"])


def test_saving_over_a_folder_that_is_no_result_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("months of work")
    with contextlib.suppress(ResultError):
        save_tables(tmp_path / "mine", HEADER, TABLES)
    assert (tmp_path / "mine" / "notes.txt").exists()


def crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a result whose second table cannot be written: the disk is full."""
    write = pd.DataFrame.to_parquet

    def to_parquet(frame: pd.DataFrame, path: Path, **options: Any) -> None:
        if path.stem == "top":
            raise OSError("No space left on device")
        write(frame, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    with pytest.raises(OSError, match="No space left"):
        save_tables(folder, replace(HEADER, form="reversed"), TABLES)


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash(tmp_path / "run", monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_keeps_the_older_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tables(tmp_path / "run", HEADER, TABLES)
    crash(tmp_path / "run", monkeypatch)
    assert load_tables(tmp_path / "run", "logit_lens")[0] == HEADER


def test_settings_that_json_cannot_hold_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_tables(tmp_path / "run", replace(HEADER, options={"model": object()}), TABLES)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"holds no result of logit_lens: there is no logit_lens\.json in it") as told:
        load_tables(tmp_path, "logit_lens")
    assert str(tmp_path) in str(told.value)


def test_a_result_of_another_recipe_is_refused(tmp_path: Path) -> None:
    folder = save_tables(tmp_path / "run", HEADER, TABLES)
    with pytest.raises(ResultError, match=r"no result of patching: there is no patching\.json"):
        load_tables(folder, "patching")


def test_a_header_knows_the_versions_that_computed_it() -> None:
    from torch import __version__

    header = Header(**{field.name: getattr(HEADER, field.name) for field in fields(Header)[:-2]})
    assert header.versions["torch"].split("+")[0] == __version__.split("+")[0]


VALUES = arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.floats(-1e3, 1e3))


@settings(deadline=None)
@given(VALUES)
def test_the_mean_is_the_mean(values: np.ndarray) -> None:
    np.testing.assert_allclose(bootstrap_mean(values)[0], values.mean(axis=0))


@settings(deadline=None)
@given(VALUES)
def test_the_interval_contains_the_mean(values: np.ndarray) -> None:
    mean, low, high = bootstrap_mean(values)
    assert ((low <= mean + 1e-9) & (mean <= high + 1e-9)).all()


@pytest.mark.parametrize("samples", [30, 100, 400])
def test_the_interval_is_as_wide_as_theory_says(samples: int) -> None:
    coin = np.arange(samples)[:, None] % 2.0  # standard deviation 0.5
    _, low, high = bootstrap_mean(coin, resamples=4000)
    assert (high - low).item() == pytest.approx(2 * 1.96 * 0.5 / samples**0.5, rel=0.15)


def test_the_interval_shrinks_with_more_samples() -> None:
    widths = [np.ptp(bootstrap_mean(np.arange(n)[:, None] % 2.0)[1:]) for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


def test_a_higher_level_is_a_wider_interval() -> None:
    coin = np.arange(50)[:, None] % 2.0
    assert np.ptp(bootstrap_mean(coin, level=0.99)[1:]) > np.ptp(bootstrap_mean(coin, level=0.5)[1:])


def test_samples_are_drawn_whole() -> None:
    values = np.random.default_rng(1).normal(size=(20, 1))
    _, low, high = bootstrap_mean(np.hstack([values, -values]))
    assert (low[0], high[0]) == pytest.approx((-high[1], -low[1]))


def test_no_samples_have_no_mean() -> None:
    assert np.isnan(bootstrap_mean(np.zeros((0, 3)))).tolist() == [[True] * 3] * 3


def test_the_same_seed_gives_the_same_numbers() -> None:
    values = np.random.default_rng(1).normal(size=(20, 2))
    np.testing.assert_array_equal(bootstrap_mean(values, seed=7), bootstrap_mean(values, seed=7))


def test_another_seed_gives_other_numbers() -> None:
    values = np.random.default_rng(1).normal(size=(20, 1))
    assert bootstrap_mean(values, seed=7)[1] != bootstrap_mean(values, seed=8)[1]


def test_a_ratio_is_of_sums_and_its_resamples_draw_both_together() -> None:
    part = np.array([[1.0, 2.0], [2.0, 4.0], [6.0, 12.0]])
    ratio, low, high = bootstrap_ratio(part, np.array([2.0, 4.0, 12.0]))
    assert (ratio.tolist(), low.tolist(), high.tolist()) == ([0.5, 1.0],) * 3
    ratio, low, high = bootstrap_ratio(part, np.array([1.0, 1.0, 1.0]))
    assert (ratio.tolist(), low.tolist(), high.tolist()) == ([3.0, 6.0], [1.0, 2.0], [6.0, 12.0])


@pytest.mark.parametrize("whole", [[0.0, 0.0], [1.0, -1.0]])
def test_a_ratio_to_nothing_is_not_a_number(whole: list[float]) -> None:
    assert np.isnan(bootstrap_ratio(np.ones((2, 3)), np.array(whole))).all()


def test_resamples_without_a_ratio_are_left_out() -> None:
    ratio, low, high = bootstrap_ratio(np.array([[1.0], [0.0]]), np.array([2.0, 0.0]))
    assert (ratio.item(), low.item(), high.item()) == (0.5, 0.5, 0.5)


def test_a_paired_difference_is_the_mean_change() -> None:
    before, after = np.array([False, False, True, True]), np.array([True, True, True, False])
    found = paired_difference(before, after)
    assert found.value == 0.25
    assert (found.low, found.high) == (-0.5, 1.0)  # changes of 1, 1, 0 and -1, of which four are drawn


def test_pairs_stay_together() -> None:
    before = np.random.default_rng(1).normal(size=50)
    assert paired_difference(before, before + 0.5) == pytest.approx((0.5, 0.5, 0.5))


def test_mcnemar_counts_the_samples_that_changed() -> None:
    before = np.array([False] * 5 + [True] * 1 + [True] * 20 + [False] * 30)
    after = np.array([True] * 5 + [False] * 1 + [True] * 20 + [False] * 30)
    found = mcnemar(before, after)
    assert (found.gained, found.lost) == (5, 1)
    assert found.p == pytest.approx(2 * (1 + 6) / 2**6)  # at most one of six fair coins, both ways


def test_without_a_change_there_is_nothing_to_doubt() -> None:
    assert mcnemar(np.array([True, False]), np.array([True, False])) == (0, 0, 1.0)


@pytest.mark.parametrize("compare", [paired_difference, mcnemar])
def test_answers_to_other_samples_are_not_compared(compare: Any) -> None:
    with pytest.raises(ValueError, match="not of the same samples: 2 and 1"):
        compare(np.array([True, False]), np.array([True]))


def test_parts_of_one_result_share_their_header(tmp_path: Path) -> None:
    stored, _ = load_tables(save_tables(tmp_path / "run", HEADER, TABLES), "logit_lens")
    assert same_header([HEADER, stored]) == HEADER


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model", "other"),
        ("weights", "ffff"),
        ("labels", ("dog",)),
        ("options", {}),
        ("versions", {}),
        ("form", "open"),
    ],
)
def test_parts_of_different_results_are_refused_with_what_differs(field: str, other: Any) -> None:
    with pytest.raises(ResultError, match=rf"they differ in {field}\."):
        same_header([HEADER, HEADER, replace(HEADER, **{field: other})])


def test_every_differing_field_is_named() -> None:
    with pytest.raises(ResultError, match="differ in dtype, form"):
        same_header([HEADER, replace(HEADER, dtype="bfloat16", form="open")])

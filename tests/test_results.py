"""A result comes back as it was saved, appears whole or not at all, and its intervals are honest."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from audio_lens_plugin.results import (
    Header,
    ResultError,
    load_tables,
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

"""Scores and tables of cells against hand-made numbers, and read back exactly as they were saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from audio_lens_plugin.recipes.scores import CellResult, Scores, cell_table
from audio_lens_plugin.results import Header, ResultError

LABELS = ("dog", "cat", "cow")
HEADER = Header("patching", "hand", None, "", "float32", "sdpa", "custom", LABELS)


class Patching(CellResult):
    """A recipe's result, as recipes write it."""

    recipe: ClassVar[str] = "patching"


def scores(logits: list[list[float]], partition: float = 3.0, ranks: list[list[int]] | None = None) -> Scores:
    values = torch.tensor(logits, dtype=torch.float32)
    known = torch.zeros(values.shape, dtype=torch.int64) if ranks is None else torch.tensor(ranks)
    nothing = torch.full((len(values),), torch.nan)
    return Scores(values, torch.full((len(values),), partition), known, nothing)


def random_scores(count: int, seed: int) -> Scores:
    source = torch.Generator().manual_seed(seed)
    return Scores(
        label_logits=torch.randn(count, 3, generator=source),
        log_partition=torch.randn(count, generator=source),
        ranks=torch.randint(150_000, (count, 3), generator=source),
        kl=torch.where(torch.arange(count) % 2 == 0, torch.rand(count, generator=source), torch.nan),
    )


def made(cells: pd.DataFrame, logits: list[list[float]], start: list[list[float]], goal: list[list[float]]) -> Patching:
    """Samples whose truth is the dog and whose foil is the cat."""
    samples = pd.DataFrame({"sample": [f"s{i}" for i in range(len(start))], "truth": "dog", "foil": "cat"})
    return Patching(HEADER, samples, cells, scores(logits), {"corrupted": scores(start), "clean": scores(goal)})


@pytest.fixture
def varied() -> Patching:
    """Every type of axis, a cell without foil, a reference in every other cell."""
    axes = [
        {"layer": 0, "position": "audio", "start": 0.1, "source": None, "all_heads": True},
        {"layer": 1, "position": "猫", "start": 1 / 3, "source": 2, "all_heads": False},
        {"layer": 2, "position": None, "start": None, "source": 3, "all_heads": None},
    ]
    samples = pd.DataFrame({"sample": ["a", "b"], "truth": ["dog", "cow"], "foil": ["cat", None]})
    runs = {"clean": random_scores(2, 1), "corrupted": random_scores(2, 2)}
    return Patching(HEADER, samples, cell_table([0, 1, 1], axes), random_scores(3, 0), runs)


def assert_same_scores(one: Scores, other: Scores) -> None:
    for name in ("label_logits", "log_partition", "ranks", "kl"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), name)


def assert_same(one: CellResult, other: CellResult) -> None:
    assert type(one) is type(other)
    assert one.header == other.header
    pd.testing.assert_frame_equal(one.samples, other.samples)
    pd.testing.assert_frame_equal(one.cells, other.cells)
    assert_same_scores(one.scores, other.scores)
    assert list(one.baselines) == list(other.baselines)
    for run in one.baselines:
        assert_same_scores(one.baselines[run], other.baselines[run])


# ------------------------------------------------------------------------------------------------------------- storage


def test_a_result_is_read_back_exactly(varied: Patching, tmp_path: Path) -> None:
    assert_same(Patching.load(varied.save(tmp_path / "result")), varied)


def test_a_result_without_baselines_is_read_back_too(varied: Patching, tmp_path: Path) -> None:
    bare = replace(varied, baselines={})
    assert_same(Patching.load(bare.save(tmp_path / "result")), bare)


def test_parts_joined_are_the_same_from_memory_and_from_disk(varied: Patching, tmp_path: Path) -> None:
    """The first part has no source, no foil and no words at all: its columns take the type of the other's."""
    axes = [{"layer": 3, "position": None, "start": None, "source": None, "all_heads": None}]
    samples = pd.DataFrame({"sample": ["c"], "truth": ["cat"], "foil": [None]})
    empty = Patching(
        HEADER,
        samples,
        cell_table([0], axes),
        random_scores(1, 3),
        {"clean": random_scores(1, 4), "corrupted": random_scores(1, 5)},
    )
    joined = Patching.concat([empty, varied])
    stored = [Patching.load(part.save(tmp_path / str(index))) for index, part in enumerate((empty, varied))]
    assert_same(Patching.concat(stored), joined)
    assert_same(Patching.load(joined.save(tmp_path / "joined")), joined)
    assert joined.cells["sample"].tolist() == [0, 1, 2, 2]
    assert joined.cells["source"].dtype == "Int64"
    assert joined.cells["source"].tolist()[2:] == [2, 3]
    assert joined.metric("log_prob")[1:] == pytest.approx(varied.metric("log_prob"))


def test_parts_with_other_baselines_are_refused(varied: Patching) -> None:
    with pytest.raises(ResultError, match="baselines differ"):
        Patching.concat([varied, replace(varied, baselines={})])


def test_parts_of_another_experiment_are_refused(varied: Patching) -> None:
    with pytest.raises(ResultError, match="differ in form"):
        Patching.concat([varied, replace(varied, header=replace(HEADER, form="open"))])


def test_an_axis_of_words_and_numbers_is_refused() -> None:
    with pytest.raises(ResultError, match="'position' mixes int, str"):
        cell_table([0, 0], [{"position": "last"}, {"position": 3}])


def test_an_axis_that_a_cell_does_not_name_is_none_there() -> None:
    table = cell_table([0, 0], [{"layer": 1}, {"layer": 2, "head": 5}])
    assert table["head"].isna().tolist() == [True, False]
    assert table["head"].iloc[1] == 5
    assert table["layer"].dtype == "int64"


def test_scores_are_read_back_from_among_other_columns() -> None:
    held = random_scores(4, 7)
    assert_same_scores(Scores.from_frame(held.to_frame().assign(layer=3)), held)


# ------------------------------------------------------------------------------------------------------------- metrics


def entry(metric, logits=(1.0, 0.5, 2.0), truth=0, foil=1, partition=3.0) -> float:
    held = scores([list(logits)], partition, [[4, 9, 0]])
    return held.metric(metric, np.array([truth]), np.array([foil])).item()


@pytest.mark.parametrize(
    ("metric", "value"),
    [("logit_diff", 0.5), ("log_prob", -2.0), ("probability", np.exp(-2.0)), ("rank", 4.0), ("accuracy", 0.0)],
)
def test_a_metric_is_what_its_formula_says(metric: str, value: float) -> None:
    assert entry(metric) == pytest.approx(value)


def test_without_a_foil_the_best_other_label_stands_for_it() -> None:
    assert entry("logit_diff", foil=-1) == pytest.approx(1.0 - 2.0)
    assert entry("logit_diff", truth=2, foil=-1) == pytest.approx(2.0 - 1.0)


def test_the_answer_is_right_where_the_truth_is_on_top() -> None:
    assert entry("accuracy", truth=2) == 1.0


def test_a_function_gets_log_probabilities_and_truths() -> None:
    assert entry(lambda log_probs, truth: log_probs[np.arange(len(truth)), truth] * 10) == pytest.approx(-20.0)


def test_a_function_that_returns_one_number_for_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(\) for 1 entries"):
        entry(lambda log_probs, truth: log_probs.mean())


def test_an_unknown_metric_is_told_which_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'loss'.*logit_diff.*accuracy"):
        entry("loss")


def test_each_cell_is_measured_by_its_own_samples_labels(varied: Patching) -> None:
    logits = varied.scores.label_logits.double().numpy()
    best_other = np.maximum(logits[1:, 0], logits[1:, 1])  # the second sample is a cow and has no foil
    expected = [logits[0, 0] - logits[0, 1], *(logits[1:, 2] - best_other)]
    np.testing.assert_allclose(varied.metric("logit_diff"), expected)


def test_divergence_needs_no_truth_and_everything_else_does(varied: Patching) -> None:
    nameless = replace(varied, samples=varied.samples.assign(truth=None))
    assert np.isnan(nameless.metric("kl")).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="true labels of some samples are not known"):
        nameless.metric("probability")


def test_an_unknown_run_is_told_which_exist(varied: Patching) -> None:
    with pytest.raises(ValueError, match=r"unknown run 'clear'.*clean, corrupted"):
        varied.baseline("log_prob", "clear")


def test_the_frame_is_tidy(varied: Patching) -> None:
    frame = varied.to_frame()
    assert frame["sample"].tolist() == ["a", "b", "b"]
    assert frame["truth"].tolist() == ["dog", "cow", "cow"]
    assert frame["layer"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(frame["logit_diff"], varied.metric("logit_diff"))
    assert frame["right"].tolist() == (frame["answer"] == frame["truth"]).tolist()


# ------------------------------------------------------------------------------------------------------------ grouping


def two_by_two() -> Patching:
    """Two samples, two layers; the second sample lacks layer 1. Logit differences: 1, 3 and 2."""
    cells = cell_table([0, 0, 1], [{"layer": 0, "head": 0}, {"layer": 1, "head": 0}, {"layer": 0, "head": 0}])
    goal, start = [[4.0, 0, 0], [2.0, 0, 0]], [[0.0, 0, 0], [0.0, 0, 0]]
    return made(cells, [[1.0, 0, 0], [3.0, 0, 0], [2.0, 0, 0]], start, goal)


def test_a_combination_is_averaged_over_the_samples_that_have_it() -> None:
    result = two_by_two()
    table = result.over_samples(result.metric("logit_diff"), ["layer"])
    assert table["layer"].tolist() == [0, 1]
    assert table["value"].tolist() == [1.5, 3.0]
    assert table["samples"].tolist() == [2, 1]
    assert (table["low"].tolist(), table["high"].tolist()) == ([1.0, 3.0], [2.0, 3.0])


def test_cells_of_one_sample_count_as_one() -> None:
    cells = cell_table([0, 0, 0, 1], [{"layer": 0, "head": head} for head in (0, 1, 2, 0)])
    result = made(cells, [[1.0, 0, 0]] * 4, [[0.0, 0, 0]] * 2, [[1.0, 0, 0]] * 2)
    table = result.over_samples(np.array([3.0, 3.0, 3.0, 1.0]), ["layer"])
    assert table["value"].tolist() == [2.0]
    assert table["samples"].tolist() == [2]


def test_an_axis_without_a_value_is_a_combination_of_its_own() -> None:
    cells = cell_table([0, 0], [{"head": 1}, {"head": None}])
    result = made(cells, [[1.0, 0, 0]] * 2, [[0.0, 0, 0]], [[1.0, 0, 0]])
    table = result.over_samples(np.array([1.0, 2.0]), ["head"])
    assert table["value"].tolist() == [1.0, 2.0]
    assert table["head"].isna().tolist() == [False, True]


def test_a_value_that_is_not_there_is_left_out(varied: Patching) -> None:
    table = varied.over_samples(varied.metric("kl"), ["layer"])
    assert table["samples"].tolist() == [1, 0, 1]
    assert table["value"].isna().tolist() == [False, True, False]


def test_unknown_axes_are_told_which_exist(varied: Patching) -> None:
    with pytest.raises(ValueError, match=r"unknown axes \['depth'\]; name some of: layer, position"):
        varied.over_samples(varied.metric("kl"), ["layer", "depth"])


def test_the_recovered_fraction_is_a_ratio_of_sums() -> None:
    table = two_by_two().recovered("logit_diff", ["layer"], start="corrupted", goal="clean")
    assert table["value"].tolist() == pytest.approx([(1 + 2) / (4 + 2), 3 / 4])  # a mean of ratios would be 0.625
    # Both samples recover 0.25 and 1: a resample of one of them twice has that ratio.
    assert (table["low"].iloc[0], table["high"].iloc[0]) == pytest.approx((0.25, 1.0))


@pytest.mark.parametrize(("run", "value"), [("corrupted", 0.0), ("clean", 1.0)])
def test_the_start_run_recovers_nothing_and_the_goal_run_all(run: str, value: float) -> None:
    runs = {"corrupted": random_scores(4, 1), "clean": random_scores(4, 2)}
    samples = pd.DataFrame({"sample": list("abcd"), "truth": "dog"})
    result = Patching(HEADER, samples, cell_table(range(4), [{"layer": 0}] * 4), runs[run], runs)
    table = result.recovered("log_prob", ["layer"], start="corrupted", goal="clean")
    assert table[["value", "low", "high"]].to_numpy().ravel() == pytest.approx([value] * 3)


def test_where_goal_and_start_agree_nothing_can_be_recovered() -> None:
    result = two_by_two()
    table = replace(result, baselines=dict.fromkeys(["a", "b"], result.baselines["clean"])).recovered(
        "logit_diff", ["layer"], start="a", goal="b"
    )
    assert table[["value", "low", "high"]].isna().all(axis=None)
    assert table["samples"].tolist() == [2, 1]


def test_the_same_seed_gives_the_same_interval() -> None:
    runs = {"corrupted": random_scores(20, 1), "clean": random_scores(20, 2)}
    samples = pd.DataFrame({"sample": [str(index) for index in range(20)], "truth": "dog"})
    result = Patching(HEADER, samples, cell_table(range(20), [{"layer": 0}] * 20), random_scores(20, 3), runs)
    ask = ("probability", ["layer"], "corrupted", "clean")
    pd.testing.assert_frame_equal(result.recovered(*ask, seed=1), result.recovered(*ask, seed=1))
    assert result.recovered(*ask, seed=1)["low"].item() != result.recovered(*ask, seed=2)["low"].item()


def test_a_result_says_what_it_is(varied: Patching) -> None:
    assert repr(varied).startswith(
        "patching of hand: 2 samples, 3 cells over layer, position, start, source, all_heads"
    )

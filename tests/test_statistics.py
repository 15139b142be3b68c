"""Intervals and tests: against theory, by hand, and with a seed."""

from __future__ import annotations

import warnings
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from audio_lens_plugin.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    correlation,
    label_permutation,
    mcnemar,
    paired_difference,
    sign_flips,
)

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


def said(words: list[int], labels: int) -> np.ndarray:
    """Shares of one layer that says one label per sample."""
    return np.eye(labels)[words][:, None, :]


def level(p: np.ndarray, at: float) -> float:
    return float((p <= at).mean())


def test_permuted_truths_are_as_likely_as_all_of_them_counted() -> None:
    random = np.random.default_rng(3)
    shares, truths = random.dirichlet(np.ones(3), size=(6, 2)), np.array([0, 0, 1, 2, 2, 1])
    shares[:, 0] = (shares[:, 0] + np.eye(3)[truths]) / 2  # the first layer knows something
    all_scores = np.array(
        [
            [np.mean([shares[s, layer, t] for s, t in enumerate(order)]) for layer in (0, 1)]
            for order in permutations(truths)
        ]
    )
    score = all_scores[0]  # permutations begin with the order given
    above = all_scores - all_scores.mean(axis=0)
    p, p_of_all = label_permutation(shares, truths, resamples=20_000)
    np.testing.assert_allclose(p, (all_scores >= score - 1e-12).mean(axis=0), atol=0.012)
    expected = (above.max(axis=1)[:, None] >= above[0] - 1e-12).mean(axis=0)
    np.testing.assert_allclose(p_of_all, expected, atol=0.012)


def test_four_right_of_four_are_one_chance_in_six() -> None:
    """Two truths of each of two labels can be dealt in six ways."""
    p, p_of_all = label_permutation(said([0, 0, 1, 1], 2), np.array([0, 0, 1, 1]), resamples=20_000)
    assert p.item() == pytest.approx(1 / 6, abs=0.012)
    assert p_of_all.item() == p.item(), "one layer is all layers"


def test_always_saying_one_word_is_no_knowledge() -> None:
    truths = np.array([0] * 45 + [1, 2, 2, 1, 2])
    shares = np.concatenate([said([0] * 50, 3), np.broadcast_to([0.1, 0.7, 0.2], (50, 1, 3))], axis=1)
    assert np.array(label_permutation(shares, truths)).tolist() == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("samples", [50, 500, 997])
def test_rounding_is_no_knowledge(samples: int) -> None:
    """The same numbers are summed in another order, so the sums differ in their last digits."""
    shares = np.tile([0.1, 0.7, 0.2], (samples, 1, 1))
    assert label_permutation(shares, np.random.default_rng(0).integers(0, 3, samples))[0].item() == 1


def test_a_layer_that_always_says_the_common_word_does_not_hide_one_that_knows() -> None:
    """It scores 0.75, the one that knows 0.625: but permuted truths give 0.75 and 0.44."""
    truths = np.array([0] * 36 + [1] * 12)
    knows = said([0] * 18 + [1] * 30, 2)
    p, p_of_all = label_permutation(np.concatenate([said([0] * 48, 2), knows], axis=1), truths)
    assert p[0] == p_of_all[0] == 1
    assert p[1] <= p_of_all[1] < 0.01


def test_samples_that_name_no_label_are_right_for_none() -> None:
    shares = said([0, 0, 1, 1] * 5, 2)
    shares[:10] = 0
    assert label_permutation(shares, np.array([0, 0, 1, 1] * 5))[0].item() < 0.05


def test_where_nothing_is_known_p_of_labels_is_uniform() -> None:
    random = np.random.default_rng(0)
    found = np.array(
        [
            label_permutation(random.dirichlet(np.ones(4), size=(24, 3)), random.integers(0, 4, 24), seed, 199)
            for seed in range(600)
        ]
    )
    one, family = found[:, 0, 0], found[:, 1].min(axis=1)
    for p in (one, family):
        assert [level(p, at) for at in (0.05, 0.25, 0.5, 0.75)] == pytest.approx([0.05, 0.25, 0.5, 0.75], abs=0.06)
    assert level(found[:, 0].min(axis=1), 0.05) > 0.1, "without the correction one of three layers is often below"
    assert (found[:, 1] >= found[:, 0]).all()


def test_a_layer_that_knows_is_found_among_those_that_do_not() -> None:
    """Five labels, 40 % known: always found; one of the 19 others is taken for it in one of twenty runs."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(100):
        truths = random.integers(0, 5, 60)
        shares = np.eye(5)[random.integers(0, 5, (60, 20))]
        shares[:24, 7] = np.eye(5)[truths[:24]]
        found.append(label_permutation(shares, truths, seed, 499))
    p, p_of_all = np.array(found).swapaxes(0, 1)
    assert level(p[:, 7], 0.01) == 1
    assert level(p_of_all[:, 7], 0.01) > 0.95
    others = np.delete(p_of_all, 7, axis=1).min(axis=1)
    assert level(others, 0.05) < 0.12


def test_truths_are_places_on_the_label_axis() -> None:
    with pytest.raises(ValueError, match=r"places among 2 labels, 0 to 1; found \[0 2\]"):
        label_permutation(said([0, 1], 2), np.array([0, 2]))


def test_flips_are_as_likely_as_all_of_them_counted() -> None:
    changes = np.random.default_rng(5).normal([0.5, 0.0, -0.3], size=(8, 3)) * [1, 10, 1]
    flips = [np.array(signs)[:, None] * changes for signs in product([1, -1], repeat=8)]
    means = np.abs([flipped.mean(axis=0) for flipped in flips])
    ts = np.abs([scipy.stats.ttest_1samp(flipped, 0).statistic for flipped in flips])
    p, p_of_all = sign_flips(changes, resamples=20_000)
    np.testing.assert_allclose(p, (means >= means[0] - 1e-12).mean(axis=0), atol=0.012)
    np.testing.assert_allclose(p_of_all, (ts.max(axis=1)[:, None] >= ts[0] - 1e-9).mean(axis=0), atol=0.012)


def test_five_changes_one_way_are_one_chance_in_sixteen() -> None:
    p, _ = sign_flips(np.array([[0.1, -0.1]] * 5), resamples=20_000)
    assert p.tolist() == pytest.approx([2 / 2**5] * 2, abs=0.008)


def test_samples_without_a_value_are_ignored() -> None:
    changes = np.array([[0.1, 3.0], [0.2, 1.0], [np.nan, 1.0], [0.1, 2.0], [0.3, 1.0]])
    p, _ = sign_flips(changes, resamples=20_000)
    assert p.tolist() == pytest.approx([2 / 2**4, 2 / 2**5], abs=0.008)


def test_no_change_is_no_evidence() -> None:
    changes = np.array([[0.0, 0.1, np.nan], [0.0, 0.2, np.nan], [0.0, 0.1, 0.0]] * 5)
    p, p_of_all = sign_flips(changes)
    assert p[[0, 2]].tolist() == p_of_all[[0, 2]].tolist() == [1, 1]
    assert p_of_all[1] < 0.01


def test_the_changes_of_a_sample_flip_together() -> None:
    change = np.random.default_rng(1).normal(0.3, size=(20, 1))
    p, p_of_all = sign_flips(np.hstack([change, -change, 100 * change]))
    assert len({*p.tolist(), *p_of_all.tolist()}) == 1, "copies of one column need no correction"


def test_where_nothing_changes_on_the_whole_p_of_flips_is_uniform() -> None:
    random = np.random.default_rng(0)
    found = np.array([sign_flips(random.standard_t(3, size=(20, 3)) * [1, 5, 0.1], seed, 199) for seed in range(600)])
    for p in (found[:, 0, 0], found[:, 1].min(axis=1)):
        assert [level(p, at) for at in (0.05, 0.25, 0.5, 0.75)] == pytest.approx([0.05, 0.25, 0.5, 0.75], abs=0.06)
    assert (found[:, 1] >= found[:, 0]).all()


def test_a_small_steady_change_is_found_beside_large_unsteady_ones() -> None:
    random = np.random.default_rng(0)
    changes = np.hstack([random.normal(0.01, 0.01, size=(40, 1)), random.normal(0, 5, size=(40, 20))])
    _, p_of_all = sign_flips(changes)
    assert p_of_all[0] < 0.001
    assert (p_of_all[1:] > 0.05).all()


@pytest.mark.parametrize(
    "test",
    [
        lambda seed: label_permutation(said([0, 1, 0, 1, 1, 0, 0], 2), np.array([0, 1, 0, 1, 0, 1, 0]), seed)[0].item(),
        lambda seed: sign_flips(np.array([[0.1], [0.2], [0.3], [-0.1], [0.1], [-0.3], [0.2]]), seed)[0].item(),
        lambda seed: correlation(np.arange(9.0), np.arange(9.0) ** 2 % 7, seed).pearson.p,
    ],
)
def test_a_seed_makes_a_test_repeatable(test: Any) -> None:
    assert test(1) == test(1)
    assert len({test(seed) for seed in range(5)}) > 1


def test_correlations_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=40)
    y = -0.3 * x + random.normal(size=40)
    found = correlation(x, y)
    for of, truth in ((found.pearson, scipy.stats.pearsonr(x, y)), (found.spearman, scipy.stats.spearmanr(x, y))):
        assert of.value == pytest.approx(truth.statistic)
        assert of.p == pytest.approx(truth.pvalue, abs=0.02)
    assert found.points == 40


def test_few_points_are_paired_in_all_ways() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0, 9.0]), np.array([2.0, 1.0, 4.0, 4.0, 3.0])
    found = correlation(x, y, resamples=120)
    for of, (a, b) in ((found.pearson, (x, y)), (found.spearman, (scipy.stats.rankdata(x), scipy.stats.rankdata(y)))):
        every = np.array([np.corrcoef(order, b)[0, 1] for order in permutations(a)])
        sides = ((every >= every[0] - 1e-9).mean(), (every <= every[0] + 1e-9).mean())
        assert of.p == pytest.approx(2 * min(sides))


def test_a_perfect_order_of_four_points_is_one_chance_in_twelve() -> None:
    found = correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([-1.0, -10.0, -100.0, -1000.0]))
    assert found.spearman == pytest.approx((-1, 2 / 24))
    assert -1 < found.pearson.value < -0.7


def test_pairs_that_lack_a_side_are_left_out() -> None:
    x = np.array([1.0, np.nan, 2.0, 3.0, 7.0, 4.0])
    y = np.array([2.0, 5.0, 1.0, np.nan, 9.0, 3.0])
    assert correlation(x, y) == correlation(x[[0, 2, 4, 5]], y[[0, 2, 4, 5]])
    assert correlation(x, y).points == 4


@pytest.mark.parametrize(
    ("x", "y", "points"),
    [
        ([], [], 0),
        ([1.0, 2.0], [1.0, 2.0], 2),
        ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0], 2),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 3),
        ([1.0, 2.0, 3.0], [0.3, 0.1 + 0.2, 0.3], 3),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 3),
    ],
)
def test_where_there_is_no_correlation_none_is_told(x: list[float], y: list[float], points: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlation(np.array(x), np.array(y))
    assert np.isnan([found.pearson, found.spearman]).all()
    assert found.points == points

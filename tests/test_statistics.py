"""Intervals and tests: against theory, by hand, and with a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from audio_lens_plugin.statistics import bootstrap_mean, bootstrap_ratio, mcnemar, paired_difference

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

"""Intervals and tests: how far a number of a few clips may be trusted.

Samples are clips, and they are drawn whole: every interval is a percentile bootstrap over them, every test of two ways
of answering is paired by them. A test by permutation asks how often chance alone does as well: p is the share of
permutations that reach what was found, which itself counts as one of them, so that p is never 0. Where many columns are
tested at once, ``p_of_all`` compares each with the best column of every permutation (Westfall and Young): it holds for
all of them together, however they hang together. The same seed gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import binomtest, permutation_test, rankdata

ROUNDING = 1e-9  # sums of the same numbers in another order are the same sum


def bootstrap_mean(
    values: Float[np.ndarray, "samples columns"], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """Mean over samples with a percentile bootstrap interval; samples are drawn whole, all columns together.

    Returns:
        mean, lower and upper end of the interval, per column; NaN where there are no samples.
    """
    if len(values) == 0:
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing, nothing
    means = bootstrap_means(values, seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(axis=0), low, high


def bootstrap_means(
    values: Float[np.ndarray, "samples columns"], seed: int = 0, resamples: int = 1000
) -> Float[np.ndarray, "resamples columns"]:
    """The mean of every bootstrap resample, for intervals of what is computed from means; needs at least one sample."""
    return _resamples(len(values), seed, resamples) @ values / len(values)


def bootstrap_ratio(
    part: Float[np.ndarray, "samples columns"],
    whole: Float[np.ndarray, " samples"],
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """Sum of ``part`` over sum of ``whole`` with a percentile bootstrap interval; samples are drawn whole.

    Resamples whose ``whole`` sums to 0 have no ratio and are left out.

    Returns:
        ratio, lower and upper end of the interval, per column; NaN where ``whole`` sums to 0.
    """
    total = whole.sum()
    if total == 0:
        nothing = np.full(part.shape[1], np.nan)
        return nothing, nothing, nothing
    draws = _resamples(len(part), seed, resamples)
    totals = draws @ whole
    ratios = (draws @ part)[totals != 0] / totals[totals != 0, None]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return part.sum(axis=0) / total, low, high


def _resamples(samples: int, seed: int, resamples: int) -> np.ndarray:
    """How often each resample draws each sample."""
    return np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=resamples)


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float


def paired_difference(
    before: Shaped[np.ndarray, " before"],
    after: Shaped[np.ndarray, " after"],
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """Mean of after - before with a percentile bootstrap interval that draws both numbers of a sample together.

    Args:
        before: one number, or whether the answer was right, per sample.
        after: the same of the same samples, in the same order.

    Raises:
        ValueError: they do not have the same number of samples.
    """
    _check_paired(before, after)
    difference = after.astype(float) - before.astype(float)
    mean, low, high = bootstrap_mean(difference[:, None], seed, resamples, level)
    return Estimate(mean.item(), low.item(), high.item())


class McNemar(NamedTuple):
    """An exact McNemar test.

    Attributes:
        gained: samples that were wrong before and are right after.
        lost: samples that were right before and are wrong after.
        p: two-sided probability of a split at least this uneven if both ways were equally likely.
    """

    gained: int
    lost: int
    p: float


def mcnemar(before: Bool[np.ndarray, " before"], after: Bool[np.ndarray, " after"]) -> McNemar:
    """Whether two ways of answering the same samples differ in accuracy: the exact test on those that changed.

    Raises:
        ValueError: they do not have the same number of samples.
    """
    _check_paired(before, after)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def _check_paired(before: np.ndarray, after: np.ndarray) -> None:
    if len(before) != len(after):
        raise ValueError(f"before and after are not of the same samples: {len(before)} and {len(after)}.")


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's step-down correction of several p values."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected


def label_permutation(
    shares: Float[np.ndarray, "samples layers labels"],
    truths: Int[np.ndarray, " samples"],
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """Whether predictions know the truths, per layer: against the same predictions of samples that swap their truths.

    The score is the mean share of a sample's true label. Permuted truths keep how often each label is true and how
    often it is said, so always saying one word is no knowledge, however often that word is true: it has p = 1.

    Args:
        shares: how much of a sample's prediction each label has, 0 to 1: one 1 where a sample says one label.
        truths: the true label of each sample, as its place on the label axis.

    Returns:
        p, one-sided (a score above that of permuted truths), per layer, and p_of_all, by the maximum over layers of the
        score above its mean over all permutations.

    Raises:
        ValueError: a truth is no place on the label axis.
    """
    labels = shares.shape[-1]
    if not np.isin(truths, range(labels)).all():
        raise ValueError(f"truths are places among {labels} labels, 0 to {labels - 1}; found {np.unique(truths)}.")
    truth_share = np.bincount(truths, minlength=labels) / max(len(truths), 1)
    expected = shares.sum(axis=0) @ truth_share
    permuted = np.random.default_rng(seed).permuted(np.tile(truths, (resamples, 1)), axis=1)
    return _against_permutations(
        _sums_of_true(shares, truths[None])[0] - expected, _sums_of_true(shares, permuted) - expected
    )


def _sums_of_true(
    shares: Float[np.ndarray, "samples layers labels"], truths: Int[np.ndarray, "permutations samples"]
) -> Float[np.ndarray, "permutations layers"]:
    """The share of the true label, summed over samples: one matrix product per label."""
    sums = np.zeros((len(truths), shares.shape[1]))
    for label in range(shares.shape[-1]):
        sums += (truths == label).astype(float) @ shares[..., label]
    return sums


def sign_flips(
    changes: Float[np.ndarray, "samples columns"], seed: int = 0, resamples: int = 2000
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """Whether samples change one way on the whole, per column: against the same changes with signs flipped by a coin.

    A sample's changes flip together. Columns are compared by their sum over its standard error, which is the root of
    the sum of squares where signs are coins.

    Args:
        changes: after minus before; NaN where a sample has no such value.

    Returns:
        p, two-sided, per column, and p_of_all, by the maximum over columns; both are 1 where nothing changes.
    """
    known = np.nan_to_num(changes)
    error = np.sqrt((known**2).sum(axis=0))
    standardised = np.divide(known, error, out=np.zeros_like(known), where=error > 0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(changes)))
    return _against_permutations(np.abs(standardised.sum(axis=0)), np.abs(signs @ standardised))


def _against_permutations(
    found: Float[np.ndarray, " columns"], permuted: Float[np.ndarray, "permutations columns"]
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """p of each column by itself, and by the maximum over columns."""
    best = permuted.max(axis=1, keepdims=True)
    reached = [(1 + (of >= found - ROUNDING).sum(axis=0)) / (1 + len(permuted)) for of in (permuted, best)]
    return reached[0], reached[1]


class Tested(NamedTuple):
    """A number and the two-sided probability of one at least this far out by chance."""

    value: float
    p: float


class Correlation(NamedTuple):
    """How two columns hang together.

    Attributes:
        pearson: in a line.
        spearman: in order.
        points: pairs that both columns have.
    """

    pearson: Tested
    spearman: Tested
    points: int


def correlation(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], seed: int = 0, resamples: int = 9999
) -> Correlation:
    """Pearson and Spearman correlation; p is of permuted pairings: exact where there are no more than ``resamples``.

    Pairs with NaN are left out. With fewer than three pairs, or where one side never changes, there is no correlation:
    its value and p are NaN.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 3 or _constant(x) or _constant(y):
        nothing = Tested(np.nan, np.nan)
        return Correlation(nothing, nothing, len(x))
    return Correlation(_pearson(x, y, seed, resamples), _pearson(rankdata(x), rankdata(y), seed, resamples), len(x))


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _pearson(x: np.ndarray, y: np.ndarray, seed: int, resamples: int) -> Tested:
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    found = permutation_test(
        (x,),
        lambda permuted, axis: np.sum(permuted * y, axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        rng=seed,
    )
    return Tested(float(np.clip(found.statistic, -1, 1)), float(found.pvalue))

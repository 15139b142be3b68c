"""Intervals and tests: how far a number of a few clips may be trusted.

Samples are clips, and they are drawn whole: every interval is a percentile bootstrap over them, every test of two ways
of answering is paired by them. The same seed gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import binomtest


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
    means = _resamples(len(values), seed, resamples) @ values / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(axis=0), low, high


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

"""What an experiment returns: tensors with a header that says where they came from, saved as parquet and JSON.

A result is a folder: ``<recipe>.json`` (the header) beside one parquet file per table, tidy, readable by anything.
Folders appear whole or not at all: they are written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from scipy.stats import binomtest

PACKAGES = ("audio-lens-plugin", "torch", "transformers", "nnsight", "transformer-lens", "numpy")


class ResultError(ValueError):
    """A saved result that cannot be read, or results that do not belong together."""


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Header:
    """Where a result came from.

    Attributes:
        recipe: the experiment's name.
        model: repo id, folder or toy.
        revision: commit or branch of the checkpoint, if known.
        weights: a fingerprint of configuration and weights.
        dtype: of the weights.
        attention: the attention implementation that ran.
        form: the prompt form, or "custom".
        labels: the label words, in the order of every label axis.
        options: the recipe's own settings.
        versions: of the packages that computed it.
    """

    recipe: str
    model: str
    revision: str | None
    weights: str
    dtype: str
    attention: str
    form: str
    labels: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_versions)


def save_tables(folder: str | os.PathLike[str], header: Header, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Write a header and its tables as a folder, whole or not at all; an older result there is replaced.

    Raises:
        ResultError: the folder is there and holds something else; nothing is touched.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / f"{header.recipe}.json").is_file():
        raise ResultError(f"{folder} holds something that is no result of {header.recipe}; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        ready = Path(scratch) / "ready"  # the scratch folder itself is readable by its owner alone
        ready.mkdir()
        for name, table in tables.items():
            table.to_parquet(ready / f"{name}.parquet", index=False)
        text = json.dumps(asdict(header), indent=2, ensure_ascii=False)
        (ready / f"{header.recipe}.json").write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        ready.rename(folder)
    return folder


def load_tables(folder: str | os.PathLike[str], recipe: str) -> tuple[Header, dict[str, pd.DataFrame]]:
    """Read what `save_tables` wrote.

    Raises:
        ResultError: the folder holds no result of this recipe.
    """
    folder = Path(folder)
    head = folder / f"{recipe}.json"
    if not head.is_file():
        raise ResultError(f"{folder} holds no result of {recipe}: there is no {head.name} in it.")
    fields = json.loads(head.read_text(encoding="utf-8"))
    fields["labels"] = tuple(fields["labels"])
    return Header(**fields), {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


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


def same_header(headers: Sequence[Header]) -> Header:
    """The header that all parts of one result share.

    Raises:
        ResultError: they differ, so their numbers must not stand in one table.
    """
    first, *others = headers
    for other in others:
        differing = [name for name, value in asdict(first).items() if asdict(other)[name] != value]
        if differing:
            raise ResultError(f"results do not belong together: they differ in {', '.join(differing)}.")
    return first

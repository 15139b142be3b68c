"""What the model says after an edit: scores of single passes, and the tables that the causal recipes make of them.

A *cell* is one edited pass over one sample; its *axes* say what was edited (layer, position, head, ...). A *baseline*
is a run that was not edited, such as "clean" or "corrupted", with one entry per sample. Metrics, in the usual symbols:

1. ``logit_diff`` = logit(truth) - logit(foil); where a sample has no foil, its best other label stands for it.
2. ``probability`` = p(truth) and ``log_prob`` = log p(truth), the softmax over the whole vocabulary.
3. ``rank`` of the truth in the whole vocabulary, 0 = on top.
4. ``kl`` = KL(reference || cell) over the whole vocabulary.
5. ``accuracy`` = 1 where the truth is on top among the labels, else 0.
6. The recovered fraction = sum over samples of (cell - start) / sum over samples of (goal - start): 0 = the start run,
   1 = the goal run. A ratio of sums is more stable than a mean of ratios, which the samples whose start and goal
   nearly agree would rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped

from audio_lens_plugin.results import Header, ResultError, load_tables, same_header, save_tables
from audio_lens_plugin.statistics import bootstrap_mean, bootstrap_ratio

NO_LABEL = -1
SHOWN_METRICS = ("probability", "logit_diff", "rank", "kl")
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A user's metric: log-probabilities ``[n, labels]`` and the index of the true label ``[n]`` -> numbers ``[n]``."""
R = TypeVar("R", bound="CellResult")


@dataclass(frozen=True, eq=False)
class Scores:
    """What the model says at the last position of rows or cells, in fp32 on the CPU.

    Attributes:
        label_logits: logit of each label.
        log_partition: log of the softmax's denominator, so that log p = logit - log_partition.
        ranks: rank of each label in the whole vocabulary, 0 = on top.
        kl: KL(reference || this) in nats over the whole vocabulary; NaN where there is no reference.
    """

    label_logits: Float[torch.Tensor, "cells labels"]
    log_partition: Float[torch.Tensor, " cells"]
    ranks: Int[torch.Tensor, "cells labels"]
    kl: Float[torch.Tensor, " cells"]

    def __len__(self) -> int:
        return len(self.label_logits)

    @property
    def log_probs(self) -> Float[torch.Tensor, "cells labels"]:
        """Log-probability of each label over the whole vocabulary."""
        return self.label_logits - self.log_partition[:, None]

    @property
    def choice(self) -> Int[torch.Tensor, " cells"]:
        """Index of the label on top among the labels."""
        return self.label_logits.argmax(-1)

    @classmethod
    def concat(cls, parts: Sequence[Scores]) -> Scores:
        """Join entries in order."""
        names = ("label_logits", "log_partition", "ranks", "kl")
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def to_frame(self) -> pd.DataFrame:
        """One line per entry: ``logit_0 ... rank_0 ...`` in the order of the labels, ``log_partition``, ``kl``."""
        columns = {f"logit_{label}": column.numpy() for label, column in enumerate(self.label_logits.unbind(1))}
        columns |= {f"rank_{label}": column.numpy() for label, column in enumerate(self.ranks.unbind(1))}
        return pd.DataFrame({**columns, "log_partition": self.log_partition.numpy(), "kl": self.kl.numpy()})

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Scores:
        """What `to_frame` wrote; other columns are left alone."""
        labels = range(sum(column.startswith("logit_") for column in frame.columns))

        def tensor(columns: str | list[str]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(frame[columns].to_numpy()).copy())

        return cls(
            label_logits=tensor([f"logit_{label}" for label in labels]),
            log_partition=tensor("log_partition"),
            ranks=tensor([f"rank_{label}" for label in labels]),
            kl=tensor("kl"),
        )

    def metric(
        self, metric: str | Metric, truth: Int[np.ndarray, " cells"], foil: Int[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """A metric of every entry.

        Args:
            metric: a name (see the top of this room), or a function ``(log_probs [n, labels], truth [n]) -> [n]``.
            truth: index of the true label; -1 where it is not known.
            foil: index of the foil; -1 where there is none.

        Raises:
            ValueError: an unknown name, unknown truths (``kl`` needs none), or a function that returns another shape.
        """
        if isinstance(metric, str) and metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; metrics are: {', '.join(METRICS)}, or a function.")
        if metric != "kl" and (truth == NO_LABEL).any():
            raise ValueError("the true labels of some samples are not known; only the metric 'kl' needs none.")
        if isinstance(metric, str):
            return METRICS[metric](self, truth, foil).astype(np.float64)
        values = np.asarray(metric(self.log_probs.double().numpy(), truth), dtype=np.float64)
        if values.shape != truth.shape:
            raise ValueError(f"the metric returned shape {values.shape} for {len(truth)} entries; one number each.")
        return values


def _of(values: torch.Tensor, label: np.ndarray) -> np.ndarray:
    return values.gather(1, torch.from_numpy(label)[:, None])[:, 0].double().numpy()


def _logit_diff(scores: Scores, truth: np.ndarray, foil: np.ndarray) -> np.ndarray:
    others = scores.label_logits.scatter(1, torch.from_numpy(truth)[:, None], -torch.inf)
    foil = np.where(foil == NO_LABEL, others.argmax(1).numpy(), foil)
    return _of(scores.label_logits, truth) - _of(scores.label_logits, foil)


METRICS: dict[str, Callable[[Scores, np.ndarray, np.ndarray], np.ndarray]] = {
    "logit_diff": _logit_diff,
    "probability": lambda scores, truth, foil: np.exp(_of(scores.log_probs, truth)),
    "log_prob": lambda scores, truth, foil: _of(scores.log_probs, truth),
    "rank": lambda scores, truth, foil: _of(scores.ranks, truth),
    "kl": lambda scores, truth, foil: scores.kl.numpy(),
    "accuracy": lambda scores, truth, foil: scores.choice.numpy() == truth,
}


def cell_table(samples: Sequence[int], axes: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of cells: ``sample`` and one column per axis, of one type each; whole numbers stay whole beside None.

    Args:
        samples: of each cell, the index of its sample.
        axes: of each cell, what was edited; an axis that a cell does not name is None there.

    Raises:
        ResultError: an axis that mixes words and numbers.
    """
    names = dict.fromkeys(name for cell in axes for name in cell)
    columns = {name: _settled(name, [cell.get(name) for cell in axes]) for name in names}
    return pd.DataFrame({"sample": np.array(samples, dtype=np.int64), **columns})


def _settled(name: str, values: Sequence[Any]) -> pd.Series:
    """A column of the one type that its values have, so that it is read back as it was saved."""
    missing = [bool(pd.isna(value)) for value in values]
    kinds = {type(value) for value, absent in zip(values, missing, strict=True) if not absent}
    plain = [None if absent else value for value, absent in zip(values, missing, strict=True)]
    if kinds and all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return pd.Series(plain, dtype="boolean" if any(missing) else "bool")
    if kinds and all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        return pd.Series(plain, dtype="Int64" if any(missing) else "int64")
    column = pd.Series(plain, dtype=None if kinds else "object")
    if kinds and column.dtype == object:
        raise ResultError(f"{name!r} mixes {', '.join(sorted(kind.__name__ for kind in kinds))}; use one type.")
    return column


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables below each other; a column that is empty in one part takes the type it has in the others."""
    names = dict.fromkeys(name for table in tables for name in table.columns)
    columns = {}
    for name in names:
        held = [table[name] if name in table else pd.Series([None] * len(table), dtype="object") for table in tables]
        alike = len({column.dtype for column in held}) == 1
        columns[name] = (
            pd.concat(held, ignore_index=True)
            if alike
            else _settled(str(name), [value for part in held for value in part])
        )
    return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False, repr=False)
class CellResult:
    """What a causal recipe found: the scores of every cell, beside those of the runs that were not edited.

    Recipes subclass it and name themselves in ``recipe``.

    Attributes:
        header: where it came from; ``header.labels`` names the label axis.
        samples: one line per sample: ``sample`` (name), ``truth`` (label word; None where unknown), and the recipe's
            own columns; ``foil`` (label word or None) is the label that ``logit_diff`` compares with.
        cells: one line per cell: ``sample`` (index into samples) and its axes (see `cell_table`).
        scores: one entry per cell.
        baselines: runs that were not edited, by name; one entry per sample.
    """

    recipe: ClassVar[str]

    header: Header
    samples: pd.DataFrame
    cells: pd.DataFrame
    scores: Scores
    baselines: dict[str, Scores]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words."""
        return self.header.labels

    @property
    def axes(self) -> list[str]:
        """The names of what the cells differ in."""
        return [name for name in self.cells.columns if name != "sample"]

    def metric(self, metric: str | Metric) -> Float[np.ndarray, " cells"]:
        """A metric of every cell: a name (see the top of this room), or a function of log-probabilities and truths.

        Raises:
            ValueError: an unknown name, or the true labels are not known.
        """
        sample = self.cells["sample"].to_numpy()
        return self.scores.metric(metric, self._label_of("truth")[sample], self._label_of("foil")[sample])

    def baseline(self, metric: str | Metric, run: str) -> Float[np.ndarray, " samples"]:
        """A metric of every sample in a run that was not edited.

        Raises:
            ValueError: an unknown name or run, or the true labels are not known.
        """
        if run not in self.baselines:
            raise ValueError(f"unknown run {run!r}; this result has: {', '.join(self.baselines) or 'none'}.")
        return self.baselines[run].metric(metric, self._label_of("truth"), self._label_of("foil"))

    def over_samples(self, values: Shaped[np.ndarray, " cells"], by: Sequence[str], seed: int = 0) -> pd.DataFrame:
        """Mean over samples with a 95 % bootstrap interval, for each combination of the axes in ``by``.

        The cells of one sample that share a combination are averaged first, so that every sample counts once. A
        combination is averaged over the samples that have it; a NaN counts as not there.

        Args:
            values: one number per cell, as `metric` gives them.

        Returns:
            columns ``by..., value, low, high, samples``, in the order in which the combinations appear.

        Raises:
            ValueError: unknown axes, or none.
        """
        table, per_sample = self._combinations(values, by)
        return _estimates(table, per_sample, lambda held, columns: bootstrap_mean(per_sample[held][:, columns], seed))

    def changes(self, by: Sequence[str], run: str, metrics: Sequence[str], seed: int = 0) -> pd.DataFrame:
        """Mean over samples of cell minus unedited run, with a 95 % bootstrap interval, per combination of axes.

        Args:
            run: name of the baseline.
            metrics: names of metrics.

        Returns:
            columns ``by..., samples``, and for each metric ``<metric>, <metric>_low, <metric>_high``.

        Raises:
            ValueError: unknown axes, metric or run, or the true labels are not known.
        """
        sample, tables = self.cells["sample"].to_numpy(), []
        for metric in metrics:
            change = self.over_samples(self.metric(metric) - self.baseline(metric, run)[sample], by, seed)
            named = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
            tables.append(change.set_index([*by, "samples"]).rename(columns=named))
        return pd.concat(tables, axis=1).reset_index()

    def recovered(self, metric: str | Metric, by: Sequence[str], start: str, goal: str, seed: int = 0) -> pd.DataFrame:
        """Recovered fraction for each combination of the axes in ``by``: 0 = the start run, 1 = the goal run.

        Sum over samples of (cell - start), divided by the sum over the same samples of (goal - start). The 95 %
        bootstrap interval draws samples whole and takes the ratio anew each time. NaN where the sums of goal and start
        are equal: there is nothing to recover.

        Args:
            start: name of the baseline that counts as 0.
            goal: name of the baseline that counts as 1.

        Returns:
            columns ``by..., value, low, high, samples``.

        Raises:
            ValueError: unknown axes, metric or runs, or the true labels are not known.
        """
        table, per_sample = self._combinations(self.metric(metric), by)
        from_start, whole = self.baseline(metric, start), self.baseline(metric, goal)
        gained, possible = per_sample - from_start[:, None], whole - from_start
        return _estimates(
            table, gained, lambda held, columns: bootstrap_ratio(gained[held][:, columns], possible[held], seed)
        )

    def to_frame(self) -> pd.DataFrame:
        """Tidy: one line per cell with its sample, axes, metrics, answer and whether the answer is right.

        Raises:
            ValueError: the true labels are not known.
        """
        about = self.samples.iloc[self.cells["sample"]].reset_index(drop=True)
        metrics = {name: self.metric(name) for name in SHOWN_METRICS}
        answer = np.array(self.labels)[self.scores.choice.numpy()]
        frame = pd.concat([about, self.cells[self.axes].reset_index(drop=True)], axis=1)
        return frame.assign(**metrics, answer=answer, right=self.metric("accuracy").astype(bool))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``<recipe>.json`` and parquet tables into a folder; `load` reads it back."""
        cells = pd.concat([self.cells.reset_index(drop=True), self.scores.to_frame()], axis=1)
        runs = [scores.to_frame().assign(run=run) for run, scores in self.baselines.items()]
        baselines = pd.concat(runs, ignore_index=True) if runs else pd.DataFrame({"run": pd.Series([], dtype="str")})
        return save_tables(folder, self.header, {"samples": self.samples, "cells": cells, "baselines": baselines})

    @classmethod
    def load(cls: type[R], folder: str | os.PathLike[str]) -> R:
        """Read a saved result.

        Raises:
            ResultError: the folder holds none of this recipe.
        """
        header, tables = load_tables(folder, cls.recipe)
        scores = Scores.from_frame(tables["cells"])
        runs = tables["baselines"].groupby("run", sort=False)
        return cls(
            header=header,
            samples=tables["samples"],
            cells=tables["cells"].drop(columns=list(scores.to_frame().columns)),
            scores=scores,
            baselines={str(run): Scores.from_frame(of_run) for run, of_run in runs},
        )

    @classmethod
    def concat(cls: type[R], parts: Sequence[R]) -> R:
        """Join the results of several batches of one experiment.

        Raises:
            ResultError: they come from different experiments.
        """
        runs = {tuple(part.baselines) for part in parts}
        if len(runs) > 1:
            raise ResultError(f"results do not belong together: their baselines differ: {sorted(runs)}.")
        offsets = np.cumsum([0] + [len(part.samples) for part in parts])
        cells = [
            part.cells.assign(sample=part.cells["sample"] + offset)
            for part, offset in zip(parts, offsets, strict=False)
        ]
        return cls(
            header=same_header([part.header for part in parts]),
            samples=_joined([part.samples for part in parts]),
            cells=_joined(cells),
            scores=Scores.concat([part.scores for part in parts]),
            baselines={run: Scores.concat([part.baselines[run] for part in parts]) for run in parts[0].baselines},
        )

    def __repr__(self) -> str:
        said = f"{self.recipe} of {self.header.model}: {len(self.samples)} samples, {len(self.cells)} cells over "
        return said + f"{', '.join(self.axes)}, labels {', '.join(self.labels)}"

    def _label_of(self, column: str) -> np.ndarray:
        """Index of each sample's truth or foil; -1 where it has none."""
        if column not in self.samples:
            return np.full(len(self.samples), NO_LABEL)
        index = {label: position for position, label in enumerate(self.labels)}
        return np.array([NO_LABEL if pd.isna(word) else index[word] for word in self.samples[column]], dtype=np.int64)

    def _combinations(self, values: np.ndarray, by: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
        """The combinations of axes that appear, and each sample's mean in them; NaN where a sample lacks one."""
        unknown = [axis for axis in by if axis not in self.axes]
        if unknown or not by:
            raise ValueError(f"unknown axes {unknown}; name some of: {', '.join(self.axes)}.")
        combination = self.cells.groupby(list(by), sort=False, dropna=False).ngroup().to_numpy()
        _, first = np.unique(combination, return_index=True)
        per_sample = np.full((len(self.samples), len(first)), np.nan)
        means = pd.Series(values, dtype="float64").groupby([self.cells["sample"].to_numpy(), combination]).mean()
        sample, column = (means.index.get_level_values(level) for level in (0, 1))
        per_sample[sample, column] = means
        return self.cells[list(by)].iloc[first].reset_index(drop=True), per_sample


def _estimates(
    table: pd.DataFrame,
    per_sample: Float[np.ndarray, "samples columns"],
    estimate: Callable[[Bool[np.ndarray, " samples"], Bool[np.ndarray, " columns"]], tuple[np.ndarray, ...]],
) -> pd.DataFrame:
    """Add value, low, high and samples to a table of combinations; those with the same samples are drawn together."""
    present = ~np.isnan(per_sample)
    found = np.full((3, len(table)), np.nan)
    patterns, pattern_of = np.unique(present, axis=1, return_inverse=True)
    for pattern, held in enumerate(patterns.T):
        columns = pattern_of.ravel() == pattern
        found[:, columns] = estimate(held, columns)
    return table.assign(value=found[0], low=found[1], high=found[2], samples=present.sum(axis=0))

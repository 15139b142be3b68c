"""Enhancement: put what an early layer knows of the audio into a later one, and see whether the answer gets better.

The intervention of AudioLens (arXiv 2506.05140 and its code, as far as both are public), in these symbols:

1. h(l, i) is the residual that leaves block l (from 0) at position i, in a run of the model that nothing was done to.
   There is a source layer s, one or several target layers t, a coefficient c, and positions i.
2. ``add``: h(t, i) += c * h(s, i).
   ``average``: h(t, i) = (h(t, i) + c * h(s, i)) / (1 + c), the mean for c = 1.
   ``matched``: h(t, i) += c * h(s, i) * |h(t, i)| / |h(s, i)|, norms taken in the plain run.
3. This happens while the prompt is processed, at all positions i together, and not at tokens that the model writes.
4. The source always comes from the plain run. A source below all targets is the same in the pass that is edited, so one
   pass would do; a source above a target takes two. Here the stored run is the first pass, and a cell the second, which
   goes on from the target layer.
5. A sweep over s, t and c sees the development clips alone. What did best there is run once on the held-out clips, and
   only their numbers say whether anything was gained: accuracy after - before with a paired bootstrap interval, and
   McNemar's exact test.
6. A grid runs every setting on all clips, so that its batches may run in any order and on several machines; the clips
   are split afterwards. The choice is made by a table that holds the development clips alone, and of the held-out ones
   only the cells of the chosen setting are kept: the same numbers as a sweep's.

The paper's code takes c = 1 at one position; its averaging reads the target's *input*, which is not copied here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from audio_lens_plugin.checks import Finding, Probe
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM, Answers
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes.causal_figures import before_after, effect_heatmap
from audio_lens_plugin.recipes.cells import Cell, CellError, Run, Write, check_layers, run_cells, store
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.recipes.scores import CellResult, Scores, cell_table
from audio_lens_plugin.recipes.twins import SITE, living_with, positions_of
from audio_lens_plugin.results import Header, ResultError
from audio_lens_plugin.statistics import bootstrap_mean, holm, mcnemar, paired_difference
from audio_lens_plugin.tracks import TRACKS

RECIPE = "enhancement"
COEFFICIENTS = (0.5, 1.0, 2.0)
DEVELOPMENT, HELD_OUT, UNDECIDED = "development", "held-out", "undecided"
SETTING = ["position", "source", "target", "coefficient"]
How = Literal["add", "average", "matched"]
ChooseBy = Literal["accuracy", "information"]


@dataclass(frozen=True)
class Enhancement:
    """One setting (see the top of this room).

    Attributes:
        source: layer that is read, from 0.
        target: layer that is written, or several.
        coefficient: c.
        position: name of positions (see `spans`).
        how: ``add``, ``average`` or ``matched``.
    """

    source: int
    target: int | tuple[int, ...]
    coefficient: float = 1.0
    position: str = "last"
    how: How = "add"

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise CellError(f"target={self.target!r}: name one layer, or several different ones.")
        if self.source in self.targets:
            raise CellError(f"layer {self.source} is source and target: that would only scale it.")
        if self.how not in get_args(How):
            raise CellError(f"how={self.how!r} is none of {', '.join(get_args(How))}.")
        if not math.isfinite(self.coefficient) or (self.how == "average" and self.coefficient < 0):
            raise CellError(f"a coefficient is a number, and of an average 0 or more; not {self.coefficient}.")

    @property
    def targets(self) -> tuple[int, ...]:
        """The target layers."""
        return (self.target,) if isinstance(self.target, int) else self.target

    def __str__(self) -> str:
        targets = ", ".join(map(str, self.targets))
        return f"layer {self.source} -> {targets} at {self.position!r}, {self.how} x {self.coefficient:g}"


@dataclass(frozen=True, eq=False, repr=False)
class EnhanceResult(CellResult):
    """What a sweep found. Axes: ``position``, ``source``, ``target``, ``coefficient``. Baseline: ``clean``.

    ``samples`` says in column ``split`` what a clip was for: ``development`` clips have a cell for every setting,
    ``held-out`` ones have one, of the chosen setting. In a grid all clips have a cell for every setting and are
    ``undecided``, until `judged` splits them.
    """

    recipe: ClassVar[str] = RECIPE

    @property
    def chosen(self) -> Enhancement:
        """The setting that did best on the development clips.

        Raises:
            ResultError: nothing was chosen yet.
        """
        if not self._is_chosen:
            raise ResultError("no setting was chosen yet: judged(grid, groups) splits the clips of a grid and chooses.")
        return Enhancement(**self.header.options["chosen"])

    def development(self) -> pd.DataFrame:
        """What the choice was made by, over development clips. These numbers are no result: the best of many is lucky.

        Returns:
            one line per setting, in the order of the sweep: ``position, source, target, coefficient``; ``accuracy``;
            ``log_prob`` (mean, of the truth); ``change`` (of accuracy, from the clean run); ``samples``.

        Raises:
            ResultError: a grid, whose clips are not split yet.
        """
        chosen = self._of(DEVELOPMENT)
        sample = self.cells["sample"].to_numpy()
        mine = chosen[sample]
        table = self.cells[SETTING].assign(accuracy=self.metric("accuracy"), log_prob=self.metric("log_prob"))[mine]
        settings = table.groupby(SETTING, sort=False)
        means = settings[["accuracy", "log_prob"]].mean()
        before = self.baseline("accuracy", "clean")[chosen].mean()
        return means.assign(change=means["accuracy"] - before, samples=settings.size()).reset_index()

    def held_out(self, seed: int = 0) -> pd.DataFrame:
        """Whether the chosen setting helps, on clips that it was not chosen by.

        Args:
            seed: of the bootstrap.

        Returns:
            one line: the setting; ``samples``; ``chance``; accuracy ``before`` and ``after``, each with ``_low`` and
            ``_high``; ``gain`` (after - before) with ``gain_low`` and ``gain_high`` (95 %, clips drawn with both their
            answers); ``gained`` and ``lost`` (clips now right, now wrong) with the ``p`` of McNemar's exact test.

        Raises:
            ResultError: a grid, whose clips are not split yet.
        """
        held = self._of(HELD_OUT)
        cells = held[self.cells["sample"].to_numpy()]
        order = self.cells["sample"].to_numpy()[cells]
        before = self.baseline("accuracy", "clean")[order].astype(bool)
        after = self.metric("accuracy")[cells].astype(bool)
        line: dict[str, Any] = {**asdict(self.chosen), "samples": len(order), "chance": 1 / len(self.labels)}
        for name, right in (("before", before), ("after", after)):
            mean, low, high = bootstrap_mean(right.astype(float)[:, None], seed)
            line |= {name: mean.item(), f"{name}_low": low.item(), f"{name}_high": high.item()}
        gain = paired_difference(before, after, seed)
        line |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        return pd.DataFrame([line | mcnemar(before, after)._asdict()])

    def plot(self) -> Figure:
        """Accuracy on the development clips by source and target, at the chosen position and coefficient.

        Where the information score chose the source there is only one, and coefficients take its place.
        """
        table, chosen = self.development(), self.chosen
        table = table[table["position"] == chosen.position]
        several = len(table["source"].unique()) > 1
        rows = "source layer" if several else "coefficient"
        if several:
            table = table[table["coefficient"] == chosen.coefficient]
        drawn = table.rename(columns={"source": "source layer", "target": "target layer"})
        fixed = f"coefficient {chosen.coefficient:g}" if several else f"source layer {chosen.source}"
        title = f"development clips (n = {table['samples'].iloc[0]}), {chosen.position}, {chosen.how}, {fixed}"
        return effect_heatmap(drawn, rows, "target layer", "change", title, "change of accuracy")

    def plot_held_out(self) -> Figure:
        """Accuracy on the held-out clips, before and after."""
        return before_after(held_out_table({str(self.chosen): self}), f"held-out clips, {self.header.model}")

    def __repr__(self) -> str:
        if not self._is_chosen:
            return f"{super().__repr__()}; nothing is chosen"
        line = self.held_out().iloc[0]
        said = f"enhancement of {self.header.model}: {self.chosen}, chosen among {len(self.development())}; "
        said += f"{line['samples']} held-out clips: accuracy {line['before']:.3f} -> {line['after']:.3f}, "
        return said + f"gain {line['gain']:+.3f} ({line['gain_low']:+.3f} to {line['gain_high']:+.3f})"

    @property
    def _is_chosen(self) -> bool:
        return "chosen" in self.header.options

    def _of(self, split: str) -> np.ndarray:
        mine = (self.samples["split"] == split).to_numpy()
        if not mine.any():
            raise ResultError(f"this result has no {split} clips; judged(grid, groups) splits the clips of a grid.")
        return mine


def enhance(lalm: LALM, batch: PromptBatch, labels: Labels | Sequence[str], setting: Enhancement) -> Answers:
    """What the model says when its target layers are enhanced.

    The source comes from a stored plain run, which is the first pass (see the top of this room).

    Args:
        labels: the label words, read as what goes on from the opened answer, or their tokens.

    Raises:
        CellError: layers that the model does not have.
        LabelError: labels that begin with the same token.
        SpanError: a row without these positions.
    """
    labels = labels_for(lalm, labels, batch.prompts)
    check_layers(lalm, [setting.source, *setting.targets])
    run = store(lalm, batch, labels.first)
    cells = [Cell(row, _writes(run, row, setting), {"row": row}) for row in range(len(batch))]
    return Answers(labels, run_cells(lalm, run, cells, labels.first).log_probs)


def enhanced(lalm: LALM, batch: PromptBatch, setting: Enhancement) -> AbstractContextManager[LALM]:
    """A model that is enhanced while it processes this batch: its ``trace``, ``answer`` and ``generate`` run so.

        with enhanced(lalm, batch, Enhancement(source=3, target=6)) as edited:
            edited.answer(batch, labels, new_tokens=10)

    Tokens that the model writes are not edited. The source comes from a plain run that is made here, once.

    Args:
        lalm: stays as it is.
        batch: the only one that the edited model takes.

    Raises:
        CellError: layers that the model does not have; inside, another batch than this one.
        SpanError: a row without these positions.
    """
    check_layers(lalm, [setting.source, *setting.targets])
    run = store(lalm, batch, torch.tensor([0]))  # whatever it says of this token, its states are wanted
    return living_with(lalm, batch, {row: _writes(run, row, setting) for row in range(len(batch))})


def enhance_sweep(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    positions: Sequence[str] = ("last",),
    how: How = "add",
    choose_by: ChooseBy = "accuracy",
    development: float = 0.5,
    seed: int = 0,
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> EnhanceResult:
    """Choose a setting on some of the clips and evaluate it on the others.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        sources: layers that may be read; all if None.
        targets: layers that may be written; all if None. A source is never its own target.
        positions: names of positions (see `spans`) that are tried.
        how: ``add``, ``average`` or ``matched``.
        choose_by: ``accuracy``: the best on the development clips; among equals the highest mean log-probability of
            the truth. ``information``: as source, at each position, only the layer whose information score (logit lens)
            is highest on the development clips; the rest by accuracy.
        development: share of the clips that the choice is made by, drawn by chance within each label. A clip that is
            asked about several times is on one side.
        seed: of that draw.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples whose runs are kept together, and rows of whole length that a pass may hold.
        folder: keep finished batches here and go on from them.

    Raises:
        CellError: unknown layers, or no setting to try.
        LabelError: labels that begin with the same token.
        SpanError: a sample that lacks these positions.
        ValueError: too few clips for two splits.
    """
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    if choose_by not in get_args(ChooseBy):
        raise CellError(f"choose_by={choose_by!r} is none of {', '.join(get_args(ChooseBy))}.")
    options = _options(lalm, labels, sources, targets, coefficients, positions, how, truncate)
    chosen_by, held_out = split(samples, development, seed)
    running: dict[str, Any] = {"form": form, "batch_size": batch_size, "folder": folder, "progress": progress}
    if choose_by == "information":
        lens = logit_lens(lalm, _Some(samples, chosen_by), labels, positions, truncate=truncate, **running)
        scores, layers = lens.information(), options["sources"]
        best_sources = {position: [_best_layer(scores, position, layers[position])] for position in positions}
        options = {**options, "sources": best_sources}
    options |= _judging(choose_by, development, seed)
    before = _run(lalm, _Some(samples, chosen_by), labels, _grid(options), DEVELOPMENT, options, **running)
    best = _best(before.development(), how)
    chosen = {**options, "chosen": asdict(best)}
    after = _run(lalm, _Some(samples, held_out), labels, [best], HELD_OUT, chosen, **running)
    return EnhanceResult.concat([replace(before, header=after.header), after])


def enhance_grid(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    coefficients: Sequence[float] = (1.0,),
    positions: Sequence[str] = ("last",),
    how: How = "add",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> EnhanceResult:
    """Run every setting on every clip, and choose later (`judged`). Grids of several batches join with ``concat``.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        sources: layers that may be read; all if None.
        targets: layers that may be written; all if None. A source is never its own target.
        positions: names of positions (see `spans`) that are tried.
        how: ``add``, ``average`` or ``matched``.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples whose runs are kept together, and rows of whole length that a pass may hold.
        folder: keep finished batches here and go on from them.

    Returns:
        a grid: all clips are ``undecided`` and have a cell for every setting.

    Raises:
        CellError: unknown layers, or no setting to try.
        LabelError: labels that begin with the same token.
        SpanError: a sample that lacks these positions.
        ValueError: no samples.
    """
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    options = _options(lalm, labels, sources, targets, coefficients, positions, how, truncate)
    running: dict[str, Any] = {"form": form, "batch_size": batch_size, "folder": folder, "progress": progress}
    return _run(lalm, samples, labels, _grid(options), UNDECIDED, options, **running)


def judged(grid: EnhanceResult, groups: Sequence[str], development: float = 0.5, seed: int = 0) -> EnhanceResult:
    """Choose a setting of a grid on some of its clips and evaluate it on the others, as `enhance_sweep` does.

    Args:
        grid: of `enhance_grid`, with all its batches.
        groups: of each of its clips, in order, what must not be on both sides: its speaker, or the clip itself.
        development: share of the groups that the choice is made by, drawn by chance within each label (of a group's
            first clip).
        seed: of that draw.

    Returns:
        what `enhance_sweep` would have found with this split: the choice, by accuracy and then by the mean
        log-probability of the truth, is made by development clips alone, and held-out clips have only the cell of the
        chosen setting.

    Raises:
        ResultError: no grid, or one that was split before.
        ValueError: not one group per clip, or too few groups for two splits.
    """
    if set(grid.samples["split"]) != {UNDECIDED}:
        raise ResultError("the clips of this result are split already; judged takes a grid, as enhance_grid makes it.")
    if len(groups) != len(grid.samples):
        raise ValueError(
            f"{len(groups)} groups do not fit the {len(grid.samples)} clips of the grid; name one per clip."
        )
    chosen_by, held_out = split_groups(groups, grid.samples["truth"].tolist(), development, seed)
    options = grid.header.options | _judging("accuracy", development, seed)
    before = _clips_of(grid, chosen_by, DEVELOPMENT, np.full(len(grid.cells), True))
    best = _best(before.development(), options["how"])
    is_best = (grid.cells[SETTING] == [getattr(best, name) for name in SETTING]).all(axis=1).to_numpy()
    after = _clips_of(grid, held_out, HELD_OUT, is_best)
    header = replace(grid.header, options={**options, "chosen": asdict(best)})
    return EnhanceResult.concat([replace(part, header=header) for part in (before, after)])


def enhance_tracks(lalm: LALM, samples: Mapping[str, Sequence[Sample]], **settings: Any) -> dict[str, EnhanceResult]:
    """A sweep for each track; `held_out_table` lays what they found below each other.

    Args:
        samples: samples by the name of their track, one of SAKURA's four.
        settings: of `enhance_sweep`.
    """
    return {name: enhance_sweep(lalm, those, TRACKS[name].labels, **settings) for name, those in samples.items()}


def held_out_table(results: Mapping[str, EnhanceResult], seed: int = 0) -> pd.DataFrame:
    """What several sweeps gained on held-out clips.

    Args:
        results: sweeps by track, or by any other name.
        seed: of the bootstrap.

    Returns:
        ``setting`` (the name), the columns of `EnhanceResult.held_out`, and ``p_of_all``: p after Holm's correction for
        as many sweeps as are in the table. Put every sweep in that was tried.
    """
    lines = [result.held_out(seed) for result in results.values()]
    table = pd.concat(lines, ignore_index=True)
    table.insert(0, "setting", list(results))
    return table.assign(p_of_all=holm(table["p"].to_numpy()))


def split(samples: Sequence[Sample], development: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of development and of held-out samples, drawn by clip and within each label.

    Raises:
        ValueError: one of the two would be empty.
    """
    groups, labels = [], []
    for sample in samples:
        # What is heard decides, not what is said of it: the transcript of a clip may be there or not.
        heard = [replace(clip, transcript=None).digest for clip in sample.prompt.clips]
        groups.append(" ".join(heard) or sample.name)
        labels.append(sample.label)
    return split_groups(groups, labels, development, seed)


def split_groups(
    groups: Sequence[str], labels: Sequence[str], development: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of development and of held-out samples, drawn by group and within each label.

    Args:
        groups: of each sample, what must not be on both sides.
        labels: of each sample; a group is drawn with those whose first sample has the same label.
        development: share of the groups.
        seed: of the draw.

    Raises:
        ValueError: one of the two would be empty.
    """
    of_group: dict[str, list[int]] = {}
    label_of: dict[str, str] = {}
    for index, (group, label) in enumerate(zip(groups, labels, strict=True)):
        of_group.setdefault(group, []).append(index)
        label_of.setdefault(group, label)
    random, drawn = np.random.default_rng(seed), []
    for label in sorted(set(label_of.values())):
        of_label = [group for group in of_group if label_of[group] == label]
        drawn += [of_label[place] for place in random.permutation(len(of_label))]
    # Every 1 / development-th one in this order: each label's share is right to within one, and so is the whole.
    chosen = {group for place, group in enumerate(drawn) if int((place + 1) * development) > int(place * development)}
    sides: tuple[list[int], list[int]] = ([], [])
    for group, indices in of_group.items():
        sides[group not in chosen].extend(indices)
    if not all(sides):
        raise ValueError(
            f"{len(of_group)} clips (or speakers) with development={development} leave one side of the split empty: "
            "one side chooses the setting, the other judges it."
        )
    return sorted(sides[0]), sorted(sides[1])


@dataclass(frozen=True)
class _Some(Sequence[Sample]):
    """Some of the samples; a clip is read when its sample is taken."""

    samples: Sequence[Sample]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Some(self.samples, self.places[index])
        return self.samples[self.places[index]]


def _options(
    lalm: LALM,
    labels: Labels,
    sources: Sequence[int] | None,
    targets: Sequence[int] | None,
    coefficients: Sequence[float],
    positions: Sequence[str],
    how: How,
    truncate: bool,
) -> dict[str, Any]:
    """What decides the settings that are tried, and their numbers, as a header holds it."""
    check_layers(lalm, [*(sources or []), *(targets or [])])
    layers = range(lalm.n_layers)
    return {
        "sources": {position: list(sources if sources is not None else layers) for position in positions},
        "targets": list(targets if targets is not None else layers),
        "coefficients": list(coefficients),
        "how": how,
        "label_form": labels.form,
        "truncate": truncate,
    }


def _judging(choose_by: ChooseBy, development: float, seed: int) -> dict[str, Any]:
    """How a setting is chosen, as a header holds it."""
    return {"choose_by": choose_by, "development": development, "seed": seed}


def _grid(options: Mapping[str, Any]) -> list[Enhancement]:
    grid = [
        Enhancement(source, target, float(coefficient), position, options["how"])
        for position, sources in options["sources"].items()
        for source, target, coefficient in product(sources, options["targets"], options["coefficients"])
        if source != target
    ]
    if not grid:
        raise CellError("no setting to try: name at least one source, another target, a coefficient and a position.")
    return grid


def _clips_of(grid: EnhanceResult, places: Sequence[int], of: str, wanted: Bool[np.ndarray, " cells"]) -> EnhanceResult:
    """Some clips of a grid, for one side of a split, with those of their cells that are wanted."""
    sample = grid.cells["sample"].to_numpy()
    kept = np.flatnonzero(wanted & np.isin(sample, places))
    return EnhanceResult(
        header=grid.header,
        samples=grid.samples.iloc[list(places)].assign(split=of).reset_index(drop=True),
        cells=grid.cells.iloc[kept].assign(sample=np.searchsorted(places, sample[kept])).reset_index(drop=True),
        scores=_entries(grid.scores, kept),
        baselines={run: _entries(scores, places) for run, scores in grid.baselines.items()},
    )


def _entries(scores: Scores, places: Sequence[int] | np.ndarray) -> Scores:
    return Scores(**{name: tensor[torch.as_tensor(places)] for name, tensor in vars(scores).items()})


def _best(table: pd.DataFrame, how: How) -> Enhancement:
    """Highest accuracy, then highest log-probability of the truth, then first."""
    line = table.sort_values(["accuracy", "log_prob"], ascending=False, kind="stable").iloc[0]
    return Enhancement(int(line["source"]), int(line["target"]), float(line["coefficient"]), line["position"], how)


def _best_layer(information: pd.DataFrame, position: str, layers: Sequence[int]) -> int:
    """The layer with the highest information score. The lens counts embeddings as 0, so block l leaves layer l + 1."""
    of_position = information[information["span"] == position].set_index("layer")["score"]
    return max(layers, key=lambda layer: (of_position[layer + 1], -layer))


def _run(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels,
    grid: Sequence[Enhancement],
    of: str,
    options: dict[str, Any],
    *,
    form: str,
    batch_size: int,
    folder: str | os.PathLike[str] | None,
    progress: bool,
) -> EnhanceResult:
    """Every setting of the grid on every sample; ``of`` is what the samples are for."""
    header = header_of(lalm, RECIPE, form, labels.words, options)

    def compute(part: Sequence[Sample], desk: Desk) -> EnhanceResult:
        return _enhance(lalm, part, labels, grid, of, header, batch_size, desk)

    return sweep(
        samples, compute, EnhanceResult, header=header, batch_size=batch_size, folder=folder, progress=progress
    )


def _enhance(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels,
    grid: Sequence[Enhancement],
    of: str,
    header: Header,
    batch_size: int,
    desk: Desk,
) -> EnhanceResult:
    batch = lalm.batch([sample.prompt for sample in samples], header.options["truncate"])
    run = store(lalm, batch, labels.first)
    total = Desk(desk.folder, lambda cells, _: desk.advance(cells, len(grid) * len(samples)))
    cells, scores = [], []
    # One source at a time: at all audio positions of a large model, the values of all would not fit.
    for source, position in dict.fromkeys((setting.source, setting.position) for setting in grid):
        mine = [setting for setting in grid if (setting.source, setting.position) == (source, position)]
        scaled = cache(partial(_scaled, run))  # targets share what is added to them
        part = [
            Cell(row, _writes(run, row, setting, scaled), {name: getattr(setting, name) for name in SETTING})
            for row in range(len(samples))
            for setting in mine
        ]
        scores.append(run_cells(lalm, run, part, labels.first, batch_size=batch_size, desk=total))
        cells += part
    truths = [labels.words[labels.index(sample.label)] for sample in samples]
    return EnhanceResult(
        header=header,
        samples=pd.DataFrame({"sample": [sample.name for sample in samples], "truth": truths, "split": of}),
        cells=cell_table([cell.row for cell in cells], [cell.axes for cell in cells]),
        scores=Scores.concat(scores),
        baselines={"clean": run.scores},
    )


def _writes(
    run: Run, row: int, setting: Enhancement, scaled: Callable[..., torch.Tensor] | None = None
) -> tuple[Write, ...]:
    """The edits of one row; ``scaled`` is `_scaled` of this run, which may remember what it gave."""
    scaled = scaled or partial(_scaled, run)
    cols = positions_of(run.batch, row, setting.position)
    whole = 1 + setting.coefficient if setting.how == "average" else 1.0
    reading = (row, setting.position, setting.source, setting.coefficient / whole)
    return tuple(
        Write(SITE, target, cols, scaled(*reading, target if setting.how == "matched" else None), keep=1 / whole)
        for target in setting.targets
    )


def _scaled(
    run: Run, row: int, position: str, source: int, factor: float, like: int | None
) -> Float[torch.Tensor, "n d_model"]:
    """``factor`` times the source at a row's positions; first scaled to the norm of layer ``like`` there, if named."""
    cols = positions_of(run.batch, row, position)
    state = run.at(SITE, source)[row, cols]
    if like is None:
        return factor * state
    norms = [run.at(SITE, layer)[row, cols].float().norm(dim=-1, keepdim=True) for layer in (like, source)]
    return (factor * norms[0] / norms[1] * state.float()).to(state.dtype)


def an_enhancement_equals_one_whole_pass(probe: Probe) -> Finding:
    """The engine, which runs as little as it can, against a whole pass of a model that is enhanced."""
    lalm, batch = probe.lalm, probe.batch(*probe.clips)
    setting = Enhancement(source=0, target=lalm.n_layers // 2, position="audio")
    ids = torch.arange(lalm.unembed._module.out_features)[:64]
    run = store(lalm, batch, ids)
    cells = [Cell(row, _writes(run, row, setting), {"row": row}) for row in range(len(batch))]
    found = run_cells(lalm, run, cells, ids).label_logits
    with enhanced(lalm, batch, setting) as edited, torch.no_grad():
        wanted = edited.module(**edited.inputs(batch), use_cache=False).logits[:, -1]
    return probe.rounding("an enhancement equals one whole pass with it", found, wanted[:, :64].float().cpu())


INVARIANTS = (an_enhancement_equals_one_whole_pass,)

"""Activation patching: put states of one run into another, and see what they bring with them.

A pair of prompts is run twice, clean and corrupted (see `pairs`). Then, for every site, layer and position:

    denoising   the corrupted run is given the clean run's state: what is *enough* for the clean answer?
    noising     the clean run is given the corrupted run's state: what does the clean answer *need*?

Both are read on one scale, the recovered fraction: 0 is the corrupted run, 1 the clean one (Wang et al., arXiv
2211.00593; on the two directions: Heimersheim and Nanda, arXiv 2404.15255).

*Attribution patching* (Nanda 2023; Syed et al., arXiv 2310.10348) estimates denoising for all layers and positions from
two forward passes and one backward pass: (clean - corrupted) · gradient of the logit difference in the corrupted run.

*Grounding*: at each layer, the effect of patching the audio positions over that of patching all of them: the share of
what decides the answer that is still to be found at the audio.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.checks import Finding, Probe
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.recipes.causal_figures import effect_heatmap
from audio_lens_plugin.recipes.cells import WRITABLE, Cell, CellError, Run, Write, plain, run_cells, store
from audio_lens_plugin.recipes.ears import EarWrite, frames_of, hear
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.recipes.pairs import FITS, Alignment, AlignmentError, Pair, align
from audio_lens_plugin.recipes.scores import CellResult, Metric, cell_table
from audio_lens_plugin.results import Header, load_tables, same_header, save_tables
from audio_lens_plugin.spans import Role
from audio_lens_plugin.statistics import bootstrap_ratio

TOWER, PROJECTOR = "audio_encoder.hook_resid_post", "audio_projector.hook_out"
SITES = (TOWER, PROJECTOR, *WRITABLE)
OF_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
POSITIONS = ("audio", "question", "attribute", "answer", "last")
EVERY = "every"
CLEAN, CORRUPTED = "clean", "corrupted"

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True, eq=False, repr=False)
class PatchResult(CellResult):
    """What patching found. Axes of a cell: ``site``, ``layer`` (of the tower for its blocks; None for the projector),
    ``position`` (the name asked for), ``unit`` (head or neuron; None for all), and where every position was patched
    alone ``index`` (in the row, counted without padding), ``token``, ``start`` and ``end`` (seconds, audio only).

    Baselines: ``clean`` and ``corrupted``.
    """

    recipe: ClassVar[str] = "activation_patching"

    def table(self, metric: str | Metric = "logit_diff", seed: int = 0) -> pd.DataFrame:
        """Recovered fraction of every site, layer, position and unit, with 95 % bootstrap intervals over pairs.

        Returns:
            columns ``site, layer, position, unit, (index,) value, low, high, samples``.
        """
        return self.recovered(metric, self._where, CORRUPTED, CLEAN, seed)

    def grounding(self, metric: str | Metric = "logit_diff", seed: int = 0) -> pd.DataFrame:
        """The grounding coefficient by layer: effect of patching the audio over effect of patching all positions.

        An effect is what a patch adds to the corrupted run, summed over pairs; intervals draw pairs whole.

        Returns:
            columns ``layer, value, low, high, samples``.

        Raises:
            ValueError: the positions ``audio`` and ``all`` were not both patched in the residual stream, or the clean
                run was noised.
        """
        stream = self.cells["site"] == "hook_resid_pre"
        gained = self.metric(metric) - self.baseline(metric, CORRUPTED)[self.cells["sample"]]
        effects = [self._by_layer(stream & (self.cells["position"] == name), gained) for name in ("audio", "all")]
        if any(table.empty for table in effects) or self.header.options["direction"] != "denoise":
            raise ValueError("grounding needs denoising of hook_resid_pre at the positions 'audio' and 'all'.")
        of_audio, of_all = effects
        rows = []
        for layer in of_all.columns:
            numbers = bootstrap_ratio(of_audio[[layer]].to_numpy(), of_all[layer].to_numpy(), seed)
            rows.append((layer, *(float(number[0]) for number in numbers), len(of_all)))
        return pd.DataFrame(rows, columns=["layer", "value", "low", "high", "samples"])

    def plot(self, metric: str | Metric = "logit_diff", site: str | None = None) -> Figure:
        """Recovered fraction by layer and position (by layer and unit where units were patched alone) at one site."""
        table = self.table(metric)
        site = site or str(table["site"].iloc[0])
        of_site = table[table["site"] == site]
        across = "unit" if of_site["unit"].notna().any() else "position"
        if "index" in of_site and of_site["index"].notna().any():
            of_site = of_site.assign(position=[_place_text(row) for row in of_site.itertuples()])
        title = f"{site}, {self.header.options['direction']}, n = {len(self.samples)} pairs"
        return effect_heatmap(of_site, "layer", across, "value", title, f"recovered {_name_of(metric)}")

    @property
    def _where(self) -> list[str]:
        return [axis for axis in ("site", "layer", "position", "unit", "index", "token", "start") if axis in self.axes]

    def _by_layer(self, chosen: pd.Series, gained: np.ndarray) -> pd.DataFrame:
        table = self.cells[chosen].assign(gained=gained[chosen.to_numpy()])
        return table.pivot_table(index="sample", columns="layer", values="gained")


def activation_patching(
    lalm: LALM,
    pairs: Sequence[Pair],
    labels: Labels | Sequence[str],
    sites: Sequence[str] = ("hook_resid_pre",),
    positions: Sequence[str] = POSITIONS,
    *,
    layers: Sequence[int] | None = None,
    units: Sequence[int] | Literal["each"] | None = None,
    direction: Direction = "denoise",
    how: str = "exact",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PatchResult:
    """Patch every site, layer and position of every pair.

    Args:
        pairs: clean and corrupted prompts (`pairs_from`).
        labels: label words, or their tokens; read by their first token at the last position.
        sites: TransformerLens's names (`SITES`): ``hook_resid_pre``, ``attn.hook_z``, ..., and
            ``audio_encoder.hook_resid_post`` (its blocks, at audio positions) and ``audio_projector.hook_out``.
        positions: names of positions (see `spans`), each patched as a whole, or ``every``: each position alone.
        layers: from 0; all of the site if None.
        units: heads (of q, k, v, z) or neurons (of ``mlp.hook_post``) that are patched one by one; ``each`` head; None
            patches all of them together.
        direction: ``denoise`` the corrupted run, or ``noise`` the clean one.
        how: what to do where the positions of a name differ in number (see `pairs.align`).
        folder: keep finished work here and go on from it.

    Raises:
        AlignmentError: positions that do not stand for each other, under ``exact``.
        CellError: an unknown site, layer or unit.
        LabelError: labels that begin with the same token.
        SpanError: a position that a prompt does not have.
    """
    labels = labels_for(lalm, labels, [pair.clean for pair in pairs[:1]])
    _check_places(lalm, sites, positions, layers, units)
    options: dict[str, Any] = {"sites": list(sites), "positions": list(positions), "direction": direction, "how": how}
    options |= {"layers": None if layers is None else list(layers), "label_form": labels.form, "truncate": truncate}
    options |= {"units": units if units is None or isinstance(units, str) else list(units)}
    header = header_of(lalm, PatchResult.recipe, form, labels.words, options)

    def compute(batch: Sequence[Pair], desk: Desk) -> PatchResult:
        return _patch(lalm, batch, labels, header, batch_size, desk)

    return sweep(
        pairs,
        compute,
        PatchResult,
        header=header,
        batch_size=batch_size,
        folder=folder,
        progress=progress,
    )


def _check_places(
    lalm: LALM, sites: Sequence[str], positions: Sequence[str], layers: Sequence[int] | None, units: Any
) -> None:
    if unknown := [site for site in sites if site not in SITES]:
        raise CellError(f"{unknown[0]!r} cannot be patched; sites are: {', '.join(SITES)}.")
    for site in sites:
        depth = _depth(lalm, site)
        if wrong := [layer for layer in layers or () if not 0 <= layer < depth]:
            raise CellError(f"{site} has no layer {wrong[0]}: its layers are 0 to {depth - 1}.")
    if units is not None and (odd := [site for site in sites if site not in (*OF_HEADS, "mlp.hook_post")]):
        raise CellError(
            f"{odd[0]} has no heads or neurons; units are those of {', '.join(OF_HEADS)} and mlp.hook_post."
        )
    if units == "each" and "mlp.hook_post" in sites:
        raise CellError("a block has thousands of neurons: say which ones, units=[...].")
    if set(sites) & {TOWER, PROJECTOR} and not any(_is_audio(name) for name in positions):
        raise CellError(
            "the audio tower and the projector have audio positions alone: ask for 'audio' among positions."
        )


def _depth(lalm: LALM, site: str) -> int:
    return len(lalm.audio_encoder.blocks) if site == TOWER else lalm.n_layers


def _is_audio(name: str) -> bool:
    return name.partition("@")[0] == "audio" or name.startswith("audio[")


def run_pairs(
    lalm: LALM,
    pairs: Sequence[Pair],
    labels: Labels,
    sites: Sequence[tuple[int, str]] = (),
    tower: bool = False,
    truncate: bool = False,
) -> tuple[Run, Run]:
    """The clean and the corrupted run of some pairs, with the activations of these sites kept."""
    ids = labels.first
    clean = store(lalm, lalm.batch([pair.clean for pair in pairs], truncate), ids, sites=sites, tower=tower)
    batch = lalm.batch([pair.corrupted for pair in pairs], truncate)
    noise = {row: [_noise(clean, row, pair)] for row, pair in enumerate(pairs) if pair.noise}
    corrupted = store(lalm, batch, ids, sites=sites, tower=tower, writes=noise, reference=clean.log_probs)
    return clean, corrupted


def _noise(clean: Run, row: int, pair: Pair) -> Write:
    """Gaussian noise on the audio embeddings, in units of their own standard deviation."""
    cols = clean.batch.at("audio").row(row)
    heard = clean.states[0][row, cols]
    drawn = torch.randn(heard.shape, generator=torch.Generator().manual_seed(pair.seed))
    values = pair.noise * heard.float().std() * drawn.to(heard.device)
    return Write("hook_resid_pre", 0, cols, values, keep=1.0)


def _patch(
    lalm: LALM, pairs: Sequence[Pair], labels: Labels, header: Header, batch_size: int, desk: Desk
) -> PatchResult:
    options = header.options
    wanted = [(layer, site) for site in options["sites"] if site in WRITABLE for layer in _layers(lalm, site, options)]
    tower = TOWER in options["sites"]
    clean, corrupted = run_pairs(lalm, pairs, labels, wanted, tower, options["truncate"])
    donor, base = (clean, corrupted) if options["direction"] == "denoise" else (corrupted, clean)
    cells = [cell for row in range(len(pairs)) for cell in _cells(lalm, donor, base, row, options)]
    cells += _tower_cells(lalm, donor, base, options, batch_size) if tower else []
    scores = run_cells(lalm, base, cells, labels.first, reference=clean.log_probs, batch_size=batch_size, desk=desk)
    truths = [labels.words[labels.index(pair.label)] for pair in pairs]
    foils = [None if pair.foil is None else labels.words[labels.index(pair.foil)] for pair in pairs]
    return PatchResult(
        header=header,
        samples=pd.DataFrame({"sample": [pair.name for pair in pairs], "truth": truths, "foil": foils}, dtype=object),
        cells=cell_table([cell.row for cell in cells], [cell.axes for cell in cells]),
        scores=scores,
        baselines={CLEAN: clean.scores, CORRUPTED: corrupted.scores},
    )


def _layers(lalm: LALM, site: str, options: dict[str, Any]) -> Sequence[int]:
    return range(_depth(lalm, site)) if options["layers"] is None else options["layers"]


def _cells(lalm: LALM, donor: Run, base: Run, row: int, options: dict[str, Any]) -> Iterator[Cell]:
    for site in options["sites"]:
        if site == TOWER:
            continue
        for place in _places(donor.batch, base.batch, row, options):
            if site == PROJECTOR:
                if _is_audio(place.axes["position"]):
                    yield _projector_cell(donor, row, place)
                continue
            for layer in _layers(lalm, site, options):
                values = place.values(donor.at(site, layer)[row])
                for unit in _units(options["units"], site, values):
                    chosen = values if unit is None else values[:, [unit]]
                    write = Write(site, layer, place.cols, chosen, None if unit is None else (unit,))
                    yield Cell(row, (write,), {"site": site, "layer": layer, **place.axes, "unit": unit})


def _projector_cell(donor: Run, row: int, place: _Place) -> Cell:
    """What the projector puts out stands at the audio positions of the first block."""
    write = Write("hook_resid_pre", 0, place.cols, place.values(donor.states[0][row]))
    return Cell(row, (write,), {"site": PROJECTOR, "layer": None, **place.axes, "unit": None})


def _units(units: Any, site: str, values: torch.Tensor) -> Sequence[int | None]:
    if units is None:
        return [None]
    count = values.shape[1]
    if units == "each":
        return range(count)
    if wrong := [unit for unit in units if not 0 <= unit < count]:
        raise CellError(f"{site} has no unit {wrong[0]}: its units are 0 to {count - 1}.")
    return units


@dataclass(frozen=True, eq=False)
class _Place:
    """Columns of the base row, how their values come out of the donor's, and what a table says of them."""

    cols: torch.Tensor
    matched: Alignment
    axes: dict[str, Any]
    index: int | None = None

    def values(self, states: torch.Tensor) -> torch.Tensor:
        values = self.matched.values(states)
        return values if self.index is None else values[[self.index]]


def _places(donor: PromptBatch, base: PromptBatch, row: int, options: dict[str, Any]) -> Iterator[_Place]:
    for name in options["positions"]:
        matched = align(donor.positions, row, base.positions, row, "all" if name == EVERY else name, options["how"])
        if name != EVERY:
            yield _Place(matched.cols, matched, {"position": name})
            continue
        for index, col in enumerate(matched.cols.tolist()):
            yield _Place(matched.cols[[index]], matched, _described(base, row, col), index)


def _described(batch: PromptBatch, row: int, col: int) -> dict[str, Any]:
    positions = batch.positions
    first = int((positions.roles[row] != Role.PAD).int().argmax())
    start, end = positions.seconds[row, col].tolist()
    named = {"position": positions.role_name(row, col), "index": col - first}
    return {**named, "token": positions.token_text(row, col), "start": start, "end": end}


def _tower_cells(lalm: LALM, donor: Run, base: Run, options: dict[str, Any], batch_size: int) -> list[Cell]:
    writes, places = [], []
    for row in range(len(base.batch)):
        for name in filter(_is_audio, options["positions"]):
            frames, giving = (_frames(run.batch, row, name) for run in (base, donor))
            if options["how"] == "exact" and len(frames) != len(giving):
                raise AlignmentError(
                    f"{name!r} has {len(giving)} frames of the audio tower in the donor and {len(frames)} in the "
                    "recipient. Say how='pool', 'crop' or 'resample', or take pairs of equal length."
                )
            if options["how"] == "crop":
                frames, giving = frames[: len(giving)], giving[: len(frames)]
            for layer in _layers(lalm, TOWER, options):
                values = FITS[options["how"]](donor.tower[layer + 1][row, giving], len(frames))
                writes.append(EarWrite(row, layer, frames, values))
                places.append({"site": TOWER, "layer": layer, "position": name, "unit": None})
    cells = []
    for write, axes, vectors in zip(
        writes, places, hear(lalm, base, writes, batch_size, options["truncate"]), strict=True
    ):
        cols = base.batch.at("audio").row(write.row)
        cells.append(Cell(write.row, (Write("hook_resid_pre", 0, cols, vectors),), axes))
    return cells


def _frames(batch: PromptBatch, row: int, name: str) -> torch.Tensor:
    seconds = batch.prompts[row].clips[0].seconds
    _, at, stretch = name.partition("@")
    if not at:
        return frames_of(seconds)
    start, _, end = stretch.partition("-")
    return frames_of(seconds, (float(start), float(end)))


def _place_text(row: Any) -> str:
    return f"{row.start:.2f} s" if row.start == row.start else f"{row.index} {row.token!r}"  # NaN is not itself


def _name_of(metric: str | Metric) -> str:
    return metric if isinstance(metric, str) else metric.__name__


@dataclass(frozen=True, eq=False, repr=False)
class AttributionResult:
    """Estimates of what denoising the residual stream adds to the logit difference, with no pass per cell.

    Attributes:
        header: where it came from.
        samples: one line per pair: ``sample``, ``truth``, ``foil``.
        cells: one line per estimate: ``sample`` (index into samples), ``site``, ``layer``, the position as in
            `PatchResult`, and ``estimate`` in logits.
    """

    recipe: ClassVar[str] = "attribution_patching"

    header: Header
    samples: pd.DataFrame
    cells: pd.DataFrame

    def agreement(self, exact: PatchResult) -> pd.DataFrame:
        """How far the estimates agree with activation patching of the same pairs, layer by layer and over all.

        Returns:
            columns ``layer`` (NA: all layers together), ``pearson``, ``spearman``, ``slope`` (of the exact effect
            against the estimate; 1 where they are equal), ``cells``; NaN where there are too few cells, or all are
            equal.

        Raises:
            ValueError: nothing that was patched was also estimated.
        """
        places = [name for name in ("layer", "position", "index") if name in exact.cells and name in self.cells]
        effects = exact.metric("logit_diff") - exact.baseline("logit_diff", CORRUPTED)[exact.cells["sample"]]
        stream = (exact.cells["site"] == "hook_resid_pre") & exact.cells["unit"].isna()
        measured = _named(exact.cells.assign(effect=effects)[stream], exact.samples, [*places, "effect"])
        both = _named(self.cells, self.samples, [*places, "estimate"]).merge(measured, on=["name", *places])
        if exact.header.options["direction"] != "denoise" or both.empty:
            raise ValueError("agreement needs denoising of hook_resid_pre in the same pairs, at the same positions.")
        rows: list[tuple[Any, ...]] = [(pd.NA, *_agreement(both["estimate"], both["effect"]))]
        rows += [(layer, *_agreement(part["estimate"], part["effect"])) for layer, part in both.groupby("layer")]
        return pd.DataFrame(rows, columns=["layer", "pearson", "spearman", "slope", "cells"])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the header and parquet tables into a folder; `load` reads it back."""
        return save_tables(folder, self.header, {"samples": self.samples, "cells": self.cells})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AttributionResult:
        """Read a saved result.

        Raises:
            ResultError: the folder holds none.
        """
        header, tables = load_tables(folder, cls.recipe)
        return cls(header, tables["samples"], tables["cells"])

    @classmethod
    def concat(cls, parts: Sequence[AttributionResult]) -> AttributionResult:
        """Join the results of several batches of one experiment.

        Raises:
            ResultError: they come from different experiments.
        """
        offsets = np.cumsum([0] + [len(part.samples) for part in parts])
        cells = [part.cells.assign(sample=part.cells["sample"] + at) for part, at in zip(parts, offsets, strict=False)]
        return cls(
            same_header([part.header for part in parts]),
            pd.concat([part.samples for part in parts], ignore_index=True),
            pd.concat(cells, ignore_index=True),
        )


def attribution_patching(
    lalm: LALM,
    pairs: Sequence[Pair],
    labels: Labels | Sequence[str],
    positions: Sequence[str] = POSITIONS,
    *,
    how: str = "exact",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> AttributionResult:
    """Estimate denoising of the residual stream at every layer: two forward passes and one backward pass a batch.

    The estimate is the first-order one: (clean state - corrupted state) · gradient of the logit difference, at the
    corrupted run. `AttributionResult.agreement` holds it against `activation_patching`.

    Args:
        positions: names, or ``every`` position alone; further arguments as in `activation_patching`.

    Raises:
        AlignmentError, LabelError, SpanError: as `activation_patching`.
    """
    labels = labels_for(lalm, labels, [pair.clean for pair in pairs[:1]])
    options = {"positions": list(positions), "how": how, "label_form": labels.form, "truncate": truncate}
    header = header_of(lalm, AttributionResult.recipe, form, labels.words, options)

    def compute(batch: Sequence[Pair], desk: Desk) -> AttributionResult:
        found = _attribute(lalm, batch, labels, header)
        desk.advance(len(found.cells), len(found.cells))
        return found

    return sweep(
        pairs,
        compute,
        AttributionResult,
        header=header,
        batch_size=batch_size,
        folder=folder,
        progress=progress,
    )


def _attribute(lalm: LALM, pairs: Sequence[Pair], labels: Labels, header: Header) -> AttributionResult:
    truncate = header.options["truncate"]
    clean = store(lalm, lalm.batch([pair.clean for pair in pairs], truncate), labels.first)
    batch = lalm.batch([pair.corrupted for pair in pairs], truncate)
    noise = {row: [_noise(clean, row, pair)] for row, pair in enumerate(pairs) if pair.noise}
    truth = torch.tensor([labels.index(pair.label) for pair in pairs])
    foil = torch.tensor([-1 if pair.foil is None else labels.index(pair.foil) for pair in pairs])
    states, gradients = _gradients(lalm, batch, labels, truth, foil, noise)
    cells = []
    for row in range(len(pairs)):
        for place in _places(clean.batch, batch, row, header.options):
            for layer in range(lalm.n_layers):
                change = place.values(clean.states[layer][row]) - states[layer][row, place.cols]
                estimate = float((change.float() * gradients[layer][row, place.cols].float()).sum())
                at = {"sample": row, "site": "hook_resid_pre", "layer": layer, **place.axes}
                cells.append({**at, "estimate": estimate})
    words = [None if at < 0 else labels.words[at] for at in foil.tolist()]
    names = {
        "sample": [pair.name for pair in pairs],
        "truth": [labels.words[at] for at in truth.tolist()],
        "foil": words,
    }
    return AttributionResult(header, pd.DataFrame(names, dtype=object), pd.DataFrame(cells))


def _gradients(
    lalm: LALM,
    batch: PromptBatch,
    labels: Labels,
    truth: torch.Tensor,
    foil: torch.Tensor,
    noise: dict[int, list[Write]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The states that enter every block, and the gradient of each row's logit difference with respect to them."""
    edits = [plain(write, row) for row, of_row in noise.items() for write in of_row]
    with lalm.trace(batch, use_cache=False) as tracer:
        found = ops.gradients(lalm.blocks, lalm.ln_final, lalm.unembed, labels.first, truth, foil, edits, lalm.d_head)
        states, gradients = save(found[0]), save(found[1])
        tracer.stop()
    return states, gradients


def _named(cells: pd.DataFrame, samples: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Cells with the names of their samples, which are the same in both results."""
    return cells[list(columns)].assign(name=samples["sample"].to_numpy()[cells["sample"]])


def _agreement(estimate: pd.Series, effect: pd.Series) -> tuple[float, float, float, int]:
    if len(estimate) < 3 or np.ptp(estimate) == 0 or np.ptp(effect) == 0:
        return np.nan, np.nan, np.nan, len(estimate)
    slope = float(np.polyfit(estimate, effect, 1)[0])
    return estimate.corr(effect), estimate.corr(effect, method="spearman"), slope, len(estimate)


def self_patches_change_nothing(probe: Probe) -> Finding:
    """Every site of a block in the middle, put back through the engine where it was read."""
    lalm, batch = probe.lalm, probe.batch(*probe.clips)
    layer, ids = lalm.n_layers // 2, torch.arange(10)
    run = store(lalm, batch, ids, sites=[(layer, site) for site in WRITABLE])
    cells = []
    for row in range(len(batch)):
        cols = batch.at("all").row(row)
        cells += [
            Cell(row, (Write(site, layer, cols, run.at(site, layer)[row, cols]),), {"site": site}) for site in WRITABLE
        ]
    found = run_cells(lalm, run, cells, ids).label_logits
    wanted = run.scores.label_logits[torch.tensor([cell.row for cell in cells])]
    return probe.rounding("a self-patch at every site changes nothing", found, wanted)


def patching_everything_gives_the_clean_run(probe: Probe) -> Finding:
    """All positions at layer 0, from one clip's run into that of silence as long."""
    lalm, clip = probe.lalm, probe.clips[0]
    ids = torch.arange(10)
    clean = store(lalm, probe.batch(clip), ids)
    other = store(lalm, probe.batch(Clip(np.flip(clip.waveform).copy(), clip.rate, "backwards", clip.transcript)), ids)
    matched = align(clean.batch.positions, 0, other.batch.positions, 0, "all", "resample")
    cell = Cell(0, (Write("hook_resid_pre", 0, matched.cols, matched.values(clean.states[0][0])),))
    found = run_cells(lalm, other, [cell], ids).label_logits
    return probe.rounding("patching all positions gives the clean run", found, clean.scores.label_logits)


INVARIANTS = (self_patches_change_nothing, patching_everything_gives_the_clean_run)

"""Attention knockout: who must read the audio, and in which layers, for the answer to be right?

1. In a window of w layers around layer c, queries are kept from reading keys (Geva et al., arXiv 2304.14767). Layers
   c - floor(w / 2) ... c - floor(w / 2) + w - 1 are cut; at both ends of the model the window is clipped, and holds
   fewer. All other attention, and everything else in these layers, stays.
2. By default the weights of the cut keys are 0 before the softmax, so that other keys take over (``mask``); else 0
   after it, and nothing takes over (``zero``). A strength s multiplies the weights by s instead. ``spread`` divides the
   weight on the keys, times s, evenly among them.
3. A query loses the keys before it. Its own position is left to it: ``attribute`` -> ``attribute`` cuts the later
   tokens of the word from the earlier ones.
4. The effect is p(truth), and accuracy, with the cut minus that of the clean run.
5. The control keeps the same queries from as many keys drawn by chance that are neither audio nor the named ones: an
   effect that the control has, too, is damage, not information. Where a query sees fewer such keys it loses all but
   one; column ``blocked`` says how many (query, key) pairs of a layer were cut. The first position may be among them:
   many models rest their attention there, and are hurt more by its loss than by that of any word.

For each sample the clip is encoded once, and a window runs from its first layer and first query on (see `cells`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from audio_lens_plugin.checks import Finding, Probe
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes.causal_figures import effect_heatmap, effect_lines
from audio_lens_plugin.recipes.cells import Cell, CellError, Cut, How, check_cut, run_cells, store
from audio_lens_plugin.recipes.cuts import Reading, control_readings, knocked_out, readings, several
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.recipes.scores import CellResult, cell_table
from audio_lens_plugin.recipes.twins import positions_of
from audio_lens_plugin.results import Header
from audio_lens_plugin.spans import SpanError

RECIPE = "attention_knockout"
WINDOW = 3
TABLE_QUERIES = ("last", "attribute", "question", "text")
TABLE_KEYS = ("audio", "transcript", "attribute")
EFFECTS = ("probability", "accuracy")


@dataclass(frozen=True, eq=False, repr=False)
class KnockoutResult(CellResult):
    """What knockouts did. Axes: ``queries``, ``keys``, ``layer`` (the window's centre, from 0), ``cut`` (``keys``, or
    ``control``), ``blocked`` ((query, key) pairs cut in each layer of the window). Baseline: ``clean``.
    """

    recipe: ClassVar[str] = RECIPE

    def effects(self, seed: int = 0) -> pd.DataFrame:
        """Change of label probability and of accuracy: cell minus clean, averaged over samples.

        Args:
            seed: of the bootstrap.

        Returns:
            one line per queries, keys, layer and cut: ``samples``; ``blocked`` (mean); ``probability`` and
            ``accuracy``, each with ``_low`` and ``_high`` (95 % bootstrap over samples).
        """
        by = ["queries", "keys", "layer", "cut"]
        table = self.changes(by, "clean", EFFECTS, seed)
        blocked = self.over_samples(self.cells["blocked"].to_numpy(float), by, seed)["value"]
        table.insert(len(by) + 1, "blocked", blocked)
        return table

    def plot(self, effect: str = "probability") -> Figure:
        """One pair of queries and keys as lines by layer, beside the control; several as a heatmap, without it.

        Args:
            effect: ``probability`` or ``accuracy``.
        """
        table = self.effects()
        window = self.header.options["window"]
        label = f"change of {'p(truth)' if effect == 'probability' else effect}"
        pairs = table["queries"] + " → " + table["keys"]
        if len(pairs.unique()) > 1:
            shown = table.assign(pair=pairs)[table["cut"] == "keys"]
            title = f"queries → keys cut, {window} layers at a time"
            return effect_heatmap(shown, "pair", "layer", effect, title, label)
        named_cuts = table["cut"].map({"keys": pairs[0], "control": "as many other keys"})
        title = f"{pairs[0]} cut, {window} layers at a time, {len(self.samples)} clips"
        drawn, low, high = table.assign(cut=named_cuts), f"{effect}_low", f"{effect}_high"
        return effect_lines(drawn, "cut", title, label, value=effect, low=low, high=high)

    def __repr__(self) -> str:
        pairs = (self.cells["queries"] + " → " + self.cells["keys"]).unique()
        said = f"attention knockout of {self.header.model}: {len(self.samples)} samples, {', '.join(pairs)} cut in "
        return said + f"{self.cells['layer'].nunique()} windows of {self.header.options['window']} layers"


def attention_knockout(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    queries: str | Sequence[str] = "last",
    keys: str | Sequence[str] = "audio",
    *,
    window: int = WINDOW,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    strength: float = 0.0,
    how: How = "mask",
    control: bool = True,
    seed: int = 0,
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> KnockoutResult:
    """Keep queries from reading keys in windows of layers, and see what becomes of the answer.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        queries: who reads: names of positions (see `spans`), one or several.
        keys: who is read: names, one or several; every one is cut from every one of ``queries``.
        window: layers that are cut together; 3 by default, a fifth to a tenth of the models at hand.
        layers: centres of the windows, from 0; all layers if None.
        heads: heads that are cut, from 0; all if None.
        strength: factor on the attention weights of the keys; 0 cuts them off.
        how: ``mask``, ``zero`` or ``spread`` (see the top of this room); the last two need
            ``load(..., attn_implementation="eager")``.
        control: also cut as many keys drawn by chance.
        seed: of the control.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples whose runs are kept together, and rows of whole length that a pass may hold.
        folder: keep finished batches here and go on from them.

    Raises:
        CellError: unknown layers or heads, a window below 1, or attention that cannot be cut so.
        LabelError: labels that begin with the same token.
        SpanError: a sample that lacks these positions.
    """
    plan = _Plan(several(queries), several(keys), window, layers, heads, strength, how, control, seed)
    return _run(lalm, samples, labels, plan, form, truncate, batch_size, folder, progress)


def knockout_table(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    *,
    window: int = WINDOW,
    layers: Sequence[int] | None = None,
    control: bool = True,
    seed: int = 0,
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> KnockoutResult:
    """Who needs to read whom: last, attribute word, question and all text, cut from audio, transcript, attribute word.

    Pairs that a sample does not have are left out: roles that its prompt lacks, and queries before all of their keys.
    For the settings see `attention_knockout`.

    Raises:
        CellError: unknown layers, a window below 1, or samples that have none of the pairs.
        LabelError: labels that begin with the same token.
    """
    plan = _Plan(TABLE_QUERIES, TABLE_KEYS, window, layers, None, 0.0, "mask", control, seed, whole=False)
    return _run(lalm, samples, labels, plan, form, truncate, batch_size, folder, progress)


@dataclass(frozen=True)
class _Plan:
    """What is cut: the settings of `attention_knockout`. ``whole``: samples must have every pair."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    window: int
    layers: Sequence[int] | None
    heads: Sequence[int] | None
    strength: float
    how: How
    control: bool
    seed: int
    whole: bool = True

    def options(self) -> dict[str, Any]:
        """For the header, as JSON would give it back."""
        listed = {
            "queries": list(self.queries),
            "keys": list(self.keys),
            "layers": None if self.layers is None else list(self.layers),
            "heads": None if self.heads is None else list(self.heads),
        }
        return {**vars(self), **listed}

    def centres(self, n_layers: int) -> Sequence[int]:
        return range(n_layers) if self.layers is None else self.layers

    def cuts(self, centre: int, n_layers: int, cut: Sequence[Reading]) -> tuple[Cut, ...]:
        """The cuts of one window."""
        heads = None if self.heads is None else tuple(self.heads)
        first = centre - self.window // 2
        layers = range(max(first, 0), min(first + self.window, n_layers))
        return tuple(Cut(layer, *reading, heads, self.strength, self.how) for layer in layers for reading in cut)


def _run(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    plan: _Plan,
    form: str,
    truncate: bool,
    batch_size: int,
    folder: str | os.PathLike[str] | None,
    progress: bool,
) -> KnockoutResult:
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    _check(lalm, plan)
    header = header_of(
        lalm, RECIPE, form, labels.words, {**plan.options(), "label_form": labels.form, "truncate": truncate}
    )

    def compute(part: Sequence[Sample], desk: Desk) -> KnockoutResult:
        return _knock_out(lalm, part, labels, plan, header, batch_size, desk)

    return sweep(
        samples, compute, KnockoutResult, header=header, batch_size=batch_size, folder=folder, progress=progress
    )


def _check(lalm: LALM, plan: _Plan) -> None:
    if plan.window < 1:
        raise CellError(f"window={plan.window} cuts no layer: it must be 1 or more.")
    nowhere = torch.zeros(0, dtype=torch.long)
    for centre in plan.centres(lalm.n_layers):
        heads = None if plan.heads is None else tuple(plan.heads)
        check_cut(lalm, Cut(centre, nowhere, nowhere, heads, plan.strength, plan.how))


def _knock_out(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels,
    plan: _Plan,
    header: Header,
    batch_size: int,
    desk: Desk,
) -> KnockoutResult:
    batch = lalm.batch([sample.prompt for sample in samples], header.options["truncate"])
    cells = [
        cell for row, sample in enumerate(samples) for cell in _cells_of(batch, row, sample.name, plan, lalm.n_layers)
    ]
    if not cells:
        raise CellError(f"samples {', '.join(sample.name for sample in samples)} have none of the pairs to cut.")
    run = store(lalm, batch, labels.first)
    scores = run_cells(lalm, run, cells, labels.first, batch_size=batch_size, desk=desk)
    names = [sample.name for sample in samples]
    truths = [labels.words[labels.index(sample.label)] for sample in samples]
    return KnockoutResult(
        header=header,
        samples=pd.DataFrame({"sample": names, "truth": truths}),
        cells=cell_table([cell.row for cell in cells], [cell.axes for cell in cells]),
        scores=scores,
        baselines={"clean": run.scores},
    )


def _cells_of(batch: PromptBatch, row: int, name: str, plan: _Plan, n_layers: int) -> list[Cell]:
    """The cells of one sample."""
    cells = []
    for queries, keys in product(plan.queries, plan.keys):
        pair = _pair(batch, row, name, queries, keys, plan)
        if pair is None:
            continue
        cuts = {"keys": readings(*pair)}
        if plan.control:
            seed = int(np.random.default_rng([plan.seed, crc32(name.encode())]).integers(2**31))
            cuts["control"] = control_readings(batch, row, keys, cuts["keys"], seed)
        nothing = (pair[0], pair[1][:0])
        for centre, (kind, cut) in product(plan.centres(n_layers), cuts.items()):
            blocked = sum(len(those) * len(lost) for those, lost in cut)
            axes = {"queries": queries, "keys": keys, "layer": centre, "cut": kind, "blocked": blocked}
            cells.append(Cell(row, plan.cuts(centre, n_layers, cut or [nothing]), axes))
    return cells


def _pair(batch: PromptBatch, row: int, name: str, queries: str, keys: str, plan: _Plan) -> Reading | None:
    """The positions of queries and keys; None where a pair that may be left out is not there."""
    try:
        pair = positions_of(batch, row, queries), positions_of(batch, row, keys)
    except SpanError as error:
        if plan.whole:
            raise SpanError(f"sample {name!r}: {error}") from None
        return None
    return pair if plan.whole or readings(*pair) else None


def a_knockout_equals_one_whole_pass(probe: Probe) -> Finding:
    """The engine, which runs as little as it can, against a full pass of the model with the cut."""
    lalm, batch = probe.lalm, probe.batch(*probe.clips)
    layers = range(lalm.n_layers // 2, lalm.n_layers)
    ids = torch.arange(lalm.unembed._module.out_features)[:64]
    cells = []
    for row in range(len(batch)):
        cut = readings(positions_of(batch, row, "question"), positions_of(batch, row, "audio"))
        cells.append(Cell(row, tuple(Cut(layer, *reading) for layer in layers for reading in cut), {}))
    found = run_cells(lalm, store(lalm, batch, ids), cells, ids).label_logits
    with knocked_out(lalm, batch, "question", "audio", layers=layers) as edited:
        inputs = edited.inputs(batch)
        with torch.no_grad():
            wanted = edited.module(**inputs, use_cache=False).logits[:, -1, ids.to(lalm.module.device)]
    return probe.rounding("a knockout equals one whole pass with the cut", found, wanted)


INVARIANTS = (a_knockout_equals_one_whole_pass,)

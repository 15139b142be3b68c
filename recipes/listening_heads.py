"""Heads that listen: which heads look at the audio, which look there because of what is heard, and which matter.

1. The mass of a head is the share of its attention, at the queries, that lies on the keys; the mean over several
   queries. Weights are read as the model makes them, which only eager attention shows.
2. The difference is the mass with the clip minus that with silence of the same length: a head may look at audio
   positions whatever they hold.
3. The effect is p(truth) with this head alone cut off from the keys, in its layer alone, minus that of the clean run.

Attention is no explanation: a head with much mass may have no effect, and the table shows both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes.causal_figures import effect_heatmap
from audio_lens_plugin.recipes.cells import Cell, CellError, Cut, run_cells, store
from audio_lens_plugin.recipes.cuts import readings
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.recipes.scores import CellResult, cell_table
from audio_lens_plugin.recipes.twins import positions_of
from audio_lens_plugin.results import Header

RECIPE = "listening_heads"
MEASURES = ("effect", "mass", "difference")


@dataclass(frozen=True, eq=False, repr=False)
class HeadsResult(CellResult):
    """What heads do. Axes: ``layer`` and ``head``, from 0; beside them what was measured: ``mass``, and ``silent_mass``
    over silence. Baseline: ``clean``.
    """

    recipe: ClassVar[str] = RECIPE

    def ranked(self, by: str = "effect", seed: int = 0) -> pd.DataFrame:
        """All heads, the first ones first.

        Args:
            by: ``effect``: the head whose loss costs the true label most stands first. ``mass``: the one that looks
                most. ``difference``: the one that looks more at the clip than at silence.
            seed: of the bootstrap.

        Returns:
            one line per head: ``layer, head``, then ``effect``, ``mass`` and ``difference``, each with ``_low`` and
            ``_high`` (95 % bootstrap over samples); ``samples``.

        Raises:
            ValueError: an unknown measure.
        """
        if by not in MEASURES:
            raise ValueError(f"heads are not ranked by {by!r}; measures are: {', '.join(MEASURES)}.")
        clean = self.baseline("probability", "clean")[self.cells["sample"].to_numpy()]
        mass = self.cells["mass"].to_numpy()
        values = {
            "effect": self.metric("probability") - clean,
            "mass": mass,
            "difference": mass - self.cells["silent_mass"].to_numpy(),
        }
        columns: dict[str, pd.Series] = {}
        for name in MEASURES:
            table = self.over_samples(values[name], ["layer", "head"], seed)
            columns |= {name: table["value"], f"{name}_low": table["low"], f"{name}_high": table["high"]}
        ranked = table[["layer", "head"]].assign(**columns, samples=table["samples"])
        return ranked.sort_values(by, ascending=by == "effect", kind="stable", ignore_index=True)

    def plot(self, by: str = "effect") -> Figure:
        """Layers by heads."""
        labels = {
            "effect": "change of p(truth) without this head",
            "mass": "share of attention",
            "difference": "share of attention, clip minus silence",
        }
        read = f"{self.header.options['queries']} → {self.header.options['keys']}"
        title = f"{read}, {len(self.samples)} clips"
        return effect_heatmap(self.ranked(by), "layer", "head", by, title, labels[by], fraction=by == "mass")

    def __repr__(self) -> str:
        read = f"{self.header.options['queries']} → {self.header.options['keys']}"
        first = self.ranked().iloc[0]
        said = f"listening heads of {self.header.model}: {len(self.samples)} samples, {read}; most is lost without "
        return said + f"layer {first['layer']:.0f} head {first['head']:.0f} (p(truth) {first['effect']:+.3f})"


def listening_heads(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    *,
    queries: str = "last",
    keys: str = "audio",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> HeadsResult:
    """Measure, for every head, how much of its attention lies on the audio, over silence too, and what its loss costs.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        queries: who reads: a name of positions (see `spans`).
        keys: who is read.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples whose runs are kept together, and rows of whole length that a pass may hold.
        folder: keep finished batches here and go on from them.

    Raises:
        CellError: the model's attention does not give its weights.
        LabelError: labels that begin with the same token.
        SpanError: a sample that lacks these positions.
    """
    if lalm.attention != "eager":
        raise CellError(
            f"attention weights are read, which {lalm.attention!r} attention does not give: "
            'load the model with load(..., attn_implementation="eager").'
        )
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    options = {"queries": queries, "keys": keys, "label_form": labels.form, "truncate": truncate}
    header = header_of(lalm, RECIPE, form, labels.words, options)

    def compute(part: Sequence[Sample], desk: Desk) -> HeadsResult:
        return _listen(lalm, part, labels, header, batch_size, desk)

    return sweep(samples, compute, HeadsResult, header=header, batch_size=batch_size, folder=folder, progress=progress)


def attention_mass(
    lalm: LALM, batch: PromptBatch, queries: str = "last", keys: str = "audio"
) -> Float[torch.Tensor, "layers batch heads"]:
    """The share of every head's attention at the queries that lies on the keys; the mean over several queries.

    Raises:
        SpanError: a row that lacks these positions.
    """
    share, counted = torch.zeros(batch.shape), torch.zeros(batch.shape)
    for row in range(len(batch)):
        reading = positions_of(batch, row, queries)
        share[row, reading] = 1 / len(reading)
        counted[row, positions_of(batch, row, keys)] = 1.0
    with torch.no_grad(), lalm.trace(batch, use_cache=False) as tracer:
        mass = save(ops.attention_mass(lalm.blocks, share, counted))
        tracer.stop()
    return mass


def _listen(
    lalm: LALM, samples: Sequence[Sample], labels: Labels, header: Header, batch_size: int, desk: Desk
) -> HeadsResult:
    queries, keys, truncate = (header.options[name] for name in ("queries", "keys", "truncate"))
    batch = lalm.batch([sample.prompt for sample in samples], truncate)
    silent = lalm.batch([sample.silenced().prompt for sample in samples], truncate)
    mass, silent_mass = (attention_mass(lalm, one, queries, keys).double().numpy() for one in (batch, silent))
    cells = [cell for row in range(len(batch)) for cell in _cells_of(lalm, batch, row, queries, keys)]
    run = store(lalm, batch, labels.first)
    scores = run_cells(lalm, run, cells, labels.first, batch_size=batch_size, desk=desk)
    table = cell_table([cell.row for cell in cells], [cell.axes for cell in cells])
    place = tuple(table[axis].to_numpy() for axis in ("layer", "sample", "head"))
    truths = [labels.words[labels.index(sample.label)] for sample in samples]
    return HeadsResult(
        header=header,
        samples=pd.DataFrame({"sample": [sample.name for sample in samples], "truth": truths}),
        cells=table.assign(mass=mass[place], silent_mass=silent_mass[place]),
        scores=scores,
        baselines={"clean": run.scores},
    )


def _cells_of(lalm: LALM, batch: PromptBatch, row: int, queries: str, keys: str) -> list[Cell]:
    """One cell per head, cut off in its own layer."""
    pair = positions_of(batch, row, queries), positions_of(batch, row, keys)
    cut = readings(*pair) or [(pair[0], pair[1][:0])]
    return [
        Cell(row, tuple(Cut(layer, *reading, (head,)) for reading in cut), {"layer": layer, "head": head})
        for layer, head in product(range(lalm.n_layers), range(lalm.n_heads))
    ]

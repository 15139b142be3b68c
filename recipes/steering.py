"""Steering: push the model towards, or away from, having heard something.

1. The audio direction of layer l is the mean over clips of h(l, i) with the clip minus h(l, i) with silence of the same
   length, where h is the residual that leaves block l (from 0) at the positions i of a name, averaged over i.
2. Steering adds a times the direction to h(l, i), at all positions i of a name, while the prompt is processed. The
   strength a counts in the direction's own length: at 1, the state moves by as much as a clip moves it on average.
3. The effect is p(truth), and accuracy, minus that of the clean run. At a = 0 it is nothing.

A direction knows the clips that it was made of. Steer others with it, or the effect is flattered.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.checks import Finding, Probe
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes.causal_figures import effect_heatmap
from audio_lens_plugin.recipes.cells import Cell, CellError, Run, Write, check_layers, run_cells, store
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.recipes.scores import CellResult, Scores, cell_table
from audio_lens_plugin.recipes.twins import SITE, living_with, positions_of
from audio_lens_plugin.results import Header, ResultError, load_tables, same_header, save_tables

DIRECTION, RECIPE = "audio_direction", "steering"
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
BY = ["layer", "strength"]


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """What hearing a clip instead of silence adds to the residual stream.

    Attributes:
        header: where it came from.
        vectors: one per layer, in the units of the residual that leaves it, fp32 on the CPU.
        clips: what it was made of: digests of the clips, one entry per sample.
    """

    header: Header
    vectors: Float[torch.Tensor, "layers d_model"]
    clips: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Tells two directions apart: a hash of the vectors."""
        return hashlib.sha256(self.vectors.numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``audio_direction.json`` and parquet tables into a folder; `load` reads it back."""
        layer, unit = np.indices(self.vectors.shape).reshape(2, -1)
        vectors = pd.DataFrame({"layer": layer, "unit": unit, "value": self.vectors.flatten().numpy()})
        return save_tables(folder, self.header, {"vectors": vectors, "clips": pd.DataFrame({"clip": self.clips})})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Direction:
        """Read a saved direction.

        Raises:
            ResultError: the folder holds none.
        """
        header, tables = load_tables(folder, DIRECTION)
        values = torch.from_numpy(tables["vectors"]["value"].to_numpy().copy())
        layers = int(tables["vectors"]["layer"].max()) + 1
        return cls(header, values.reshape(layers, -1), tuple(tables["clips"]["clip"]))

    @classmethod
    def concat(cls, parts: Sequence[Direction]) -> Direction:
        """The mean over the clips of several batches.

        Raises:
            ResultError: they come from different experiments.
        """
        counts = torch.tensor([len(part.clips) for part in parts], dtype=torch.float64)
        vectors = torch.stack([part.vectors.double() for part in parts])
        mean = torch.einsum("p,pld->ld", counts / counts.sum(), vectors).float()
        clips = tuple(clip for part in parts for clip in part.clips)
        return cls(same_header([part.header for part in parts]), mean, clips)

    def __repr__(self) -> str:
        layers, width = self.vectors.shape
        said = f"audio direction of {self.header.model} at {self.header.options['position']!r}: {layers} layers of "
        return said + f"{width}, from {len(self.clips)} samples, {self.fingerprint}"


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult(CellResult):
    """What steering did. Axes: ``layer`` (from 0), ``strength``. Baseline: ``clean``.

    ``header.options`` has the direction's ``fingerprint``, and how many of the samples it ``shared``: those whose clips
    it was itself made of.
    """

    recipe: ClassVar[str] = RECIPE

    def effects(self, seed: int = 0) -> pd.DataFrame:
        """Change of label probability and of accuracy: cell minus clean, averaged over samples.

        Args:
            seed: of the bootstrap.

        Returns:
            one line per layer and strength: ``samples``; ``probability`` and ``accuracy``, each with ``_low`` and
            ``_high`` (95 % bootstrap over samples).
        """
        return self.changes(BY, "clean", ("probability", "accuracy"), seed)

    def plot(self, effect: str = "probability") -> Figure:
        """Effects by layer and strength.

        Args:
            effect: ``probability`` or ``accuracy``.
        """
        title = f"audio direction added, {len(self.samples)} clips"
        label = f"change of {'p(truth)' if effect == 'probability' else effect}"
        return effect_heatmap(self.effects(), "strength", "layer", effect, title, label)


def audio_direction(
    lalm: LALM,
    samples: Sequence[Sample],
    *,
    position: str = "last",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Direction:
    """The audio direction of every layer (see the top of this room), at the positions of a name.

    Args:
        samples: with clips; each is also run over silence of the same length.
        form: the prompt form, for the header.
        truncate: cut clips that are longer than the model's window, with a warning.
        folder: keep finished batches here and go on from them.

    Raises:
        CellError: a sample without a clip.
        SpanError: a sample that lacks these positions.
    """
    header = header_of(lalm, DIRECTION, form, (), {"position": position, "truncate": truncate})

    def compute(part: Sequence[Sample], desk: Desk) -> Direction:
        mute = [sample.name for sample in part if not sample.prompt.clips]
        if mute:
            raise CellError(f"samples without a clip have no audio direction: {', '.join(mute)}.")
        heard, silent = (_states(lalm, those, position, truncate) for those in (part, [s.silenced() for s in part]))
        desk.advance(len(part), len(part))
        return Direction(header, (heard - silent).mean(1).float(), tuple(_played(sample) for sample in part))

    return sweep(samples, compute, Direction, header=header, batch_size=batch_size, folder=folder, progress=progress)


def steering_sweep(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    direction: Direction,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    position: str = "last",
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SteeringResult:
    """Add a direction at one layer at a time, with several strengths, and see what becomes of the answer.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        direction: of this model; best made of other clips.
        layers: from 0; all if None.
        position: name of the positions (see `spans`) that are steered, whatever those were that it was made at.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples whose runs are kept together, and rows of whole length that a pass may hold.
        folder: keep finished batches here and go on from them.

    Raises:
        CellError: layers that the model does not have.
        LabelError: labels that begin with the same token.
        ResultError: the direction is another model's.
        SpanError: a sample that lacks these positions.
    """
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    _check(lalm, direction, layers or ())
    options = {
        "fingerprint": direction.fingerprint,
        "direction": direction.header.options,
        "shared": sum(_played(sample) in direction.clips for sample in samples),
        "layers": list(range(lalm.n_layers) if layers is None else layers),
        "strengths": [float(strength) for strength in strengths],
        "position": position,
        "label_form": labels.form,
        "truncate": truncate,
    }
    header = header_of(lalm, RECIPE, form, labels.words, options)

    def compute(part: Sequence[Sample], desk: Desk) -> SteeringResult:
        return _steer(lalm, part, labels, direction, header, batch_size, desk)

    return sweep(
        samples, compute, SteeringResult, header=header, batch_size=batch_size, folder=folder, progress=progress
    )


def steered(
    lalm: LALM, batch: PromptBatch, direction: Direction, layer: int, strength: float = 1.0, position: str = "last"
) -> AbstractContextManager[LALM]:
    """A model that is steered while it processes this batch: its ``trace``, ``answer`` and ``generate`` run so.

    Tokens that the model writes are not steered (see `enhancement.enhanced`).

    Raises:
        CellError: a layer that the model does not have; inside, another batch than this one.
        ResultError: the direction is another model's.
        SpanError: a row without these positions.
    """
    _check(lalm, direction, [layer])
    writes = {row: [_write(batch, row, direction, layer, strength, position)] for row in range(len(batch))}
    return living_with(lalm, batch, writes)


def _check(lalm: LALM, direction: Direction, layers: Sequence[int]) -> None:
    if direction.header.weights != lalm.fingerprint:
        raise ResultError(f"the direction is of {direction.header.model} with other weights than {lalm.name}'s.")
    check_layers(lalm, layers)


def _write(batch: PromptBatch, row: int, direction: Direction, layer: int, strength: float, position: str) -> Write:
    cols = positions_of(batch, row, position)
    return Write(SITE, layer, cols, (strength * direction.vectors[layer]).expand(len(cols), -1), keep=1.0)


def _played(sample: Sample) -> str:
    """What is heard in a sample, whatever is said of it."""
    return " ".join(replace(clip, transcript=None).digest for clip in sample.prompt.clips)


def _states(lalm: LALM, samples: Sequence[Sample], position: str, truncate: bool) -> Float[torch.Tensor, "layers n d"]:
    """What leaves every block, averaged over each sample's positions of a name."""
    batch = lalm.batch([sample.prompt for sample in samples], truncate)
    cols = [positions_of(batch, row, position) for row in range(len(batch))]
    with torch.no_grad(), lalm.trace(batch, use_cache=False) as tracer:
        means = save(ops.mean_states(lalm.blocks, cols))
        tracer.stop()
    return means


def _steer(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels,
    direction: Direction,
    header: Header,
    batch_size: int,
    desk: Desk,
) -> SteeringResult:
    options = header.options
    batch = lalm.batch([sample.prompt for sample in samples], options["truncate"])
    run = store(lalm, batch, labels.first)
    cells = [
        Cell(
            row,
            (_write(batch, row, direction, layer, strength, options["position"]),),
            {"layer": layer, "strength": strength},
        )
        for row in range(len(samples))
        for layer, strength in product(options["layers"], options["strengths"])
    ]
    truths = [labels.words[labels.index(sample.label)] for sample in samples]
    return SteeringResult(
        header=header,
        samples=pd.DataFrame({"sample": [sample.name for sample in samples], "truth": truths}),
        cells=cell_table([cell.row for cell in cells], [cell.axes for cell in cells]),
        scores=_scores(lalm, run, cells, labels, batch_size, desk),
        baselines={"clean": run.scores},
    )


def _scores(lalm: LALM, run: Run, cells: Sequence[Cell], labels: Labels, batch_size: int, desk: Desk) -> Scores:
    """Scores of the cells; those of strength 0 are the run's own, to the last bit."""
    moved = [cell for cell in cells if cell.axes["strength"]]
    unmoved = replace(run.scores, kl=torch.zeros_like(run.scores.kl))
    if not moved:
        together = unmoved
    else:
        found = run_cells(lalm, run, moved, labels.first, batch_size=batch_size, desk=desk)
        together = Scores.concat([unmoved, found])
    after = iter(range(len(unmoved), len(together)))
    order = torch.tensor([next(after) if cell.axes["strength"] else cell.row for cell in cells])
    return Scores(**{name: numbers[order] for name, numbers in vars(together).items()})


def a_steered_cell_equals_one_whole_pass(probe: Probe) -> Finding:
    """The engine, which runs as little as it can, against a whole pass of a model that is steered."""
    lalm, batch = probe.lalm, probe.batch(*probe.clips)
    samples = [Sample(str(row), prompt, "") for row, prompt in enumerate(batch.prompts)]
    direction = audio_direction(lalm, samples, truncate=True)
    ids, layer = torch.arange(64), lalm.n_layers // 2
    cells = [Cell(row, (_write(batch, row, direction, layer, 1.0, "question"),), {"row": row}) for row in range(2)]
    found = run_cells(lalm, store(lalm, batch, ids), cells, ids).label_logits
    with steered(lalm, batch, direction, layer, position="question") as edited, torch.no_grad():
        wanted = edited.module(**edited.inputs(batch), use_cache=False).logits[:, -1]
    return probe.rounding("a steered cell equals one whole pass with it", found, wanted[:, :64].float().cpu())


INVARIANTS = (a_steered_cell_equals_one_whole_pass,)

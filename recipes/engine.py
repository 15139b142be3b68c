"""The engine room: recipes describe what to compute for a batch of samples, this room runs it.

Samples are taken in batches, in order. A batch that is finished lies on disk under a key made of everything that
decides its numbers (model, settings, prompts, the audio itself), so a second start computes only what is missing.
Where memory runs out, the batch is halved and the sweep goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.results import Header


@runtime_checkable
class Part(Protocol):
    """A result of some of the samples: it can be stored, read back, and joined to others."""

    def save(self, folder: str | os.PathLike[str]) -> Path: ...

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Any: ...

    @classmethod
    def concat(cls, parts: Sequence[Any]) -> Any: ...


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Plan:
    """What one batch of a recipe will take, told before it runs. Works on a model whose weights are not there (meta).

    Attributes:
        layers: states that are read: the embeddings and every block's output.
        positions: length of the sequence, with padding.
        read: positions that are read, over all rows.
        weights: bytes of the model's weights.
        working: bytes that the recipe holds at once beyond the model's own forward pass.
        result: bytes of what it gives back.
    """

    layers: int
    positions: int
    read: int
    weights: int
    working: int
    result: int


def weight_bytes(lalm: LALM) -> int:
    """Bytes of a model's weights; weights that several modules share count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in lalm.module.parameters())


def header_of(lalm: LALM, recipe: str, form: str, labels: Sequence[str], options: dict[str, Any]) -> Header:
    """The header of a result of this model."""
    return Header(
        recipe=recipe,
        model=lalm.name,
        revision=lalm.revision,
        weights=lalm.fingerprint,
        dtype=str(lalm.dtype).removeprefix("torch."),
        attention=lalm.attention,
        form=form,
        labels=tuple(labels),
        options=options,
    )


def sweep(
    samples: Sequence[Sample],
    compute: Callable[[Sequence[Sample]], P],
    kind: type[P],
    *,
    header: Header,
    batch_size: int,
    folder: Path | None,
    progress: bool,
) -> P:
    """Run ``compute`` over all samples in batches and join what it returns.

    Args:
        kind: the class that ``compute`` returns.
        header: decides, with the samples, under which key a finished batch is kept.
        folder: where finished batches are kept; None keeps nothing.

    Raises:
        ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("there are no samples to run.")
    parts = []
    with _progress_bar(progress) as bar:
        task = bar.add_task(header.recipe, total=len(samples))
        for start in range(0, len(samples), batch_size):
            batch = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
            parts.append(_stored(batch, compute, kind, None if folder is None else folder / part_key(header, batch)))
            bar.advance(task, len(batch))
    return kind.concat(parts)


def _stored(batch: Sequence[Sample], compute: Callable[[Sequence[Sample]], P], kind: type[P], place: Path | None) -> P:
    if place is not None and place.is_dir():
        return kind.load(place)
    part = _halving(batch, compute, kind)
    if place is not None:
        part.save(place)
    return part


def _halving(batch: Sequence[Sample], compute: Callable[[Sequence[Sample]], P], kind: type[P]) -> P:
    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside the except block: there the error would still hold the tensors of the failed pass.
    middle = len(batch) // 2
    return kind.concat([_halving(half, compute, kind) for half in (batch[:middle], batch[middle:])])


def part_key(header: Header, batch: Sequence[Sample]) -> str:
    """A name for what decides a batch's numbers: equal key, equal numbers."""
    described = [asdict(header), [_describe(sample) for sample in batch]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


def _describe(sample: Sample) -> list[Any]:
    prompt = sample.prompt
    words = [prompt.question, prompt.options, prompt.answer, prompt.system, prompt.attribute]
    return [sample.name, sample.label, [clip.digest for clip in prompt.clips], words]


class _Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} clips/s", style="progress.data.speed")


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        disable=not show,
    )

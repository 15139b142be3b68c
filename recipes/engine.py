"""The engine room: recipes describe what to compute for a batch of samples, this room runs it.

Samples are taken in batches, in order. A batch that is finished lies on disk under a key made of everything that
decides its numbers (model, settings, prompts, the audio itself), so a second start computes only what is missing. What
a batch has finished before it is whole lies on its `Desk`. Where memory runs out, the batch is halved and the sweep
goes on. How few passes a recipe's edits take is the business of the room next door, `cells`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from safetensors.torch import load_file, save_file

from audio_lens_plugin.labels import Labels, form_after
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Prompt
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
class Desk:
    """What the computation of one batch may use: a place for what it has finished, and somebody to tell.

    Attributes:
        folder: where finished pieces are kept until the batch is whole; None keeps nothing.
        advance: told how many cells are finished, and of how many in this batch.
    """

    folder: Path | None = None
    advance: Callable[[int, int], None] = field(default=lambda cells, of: None)

    def kept(self, key: str, compute: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """The tensors under this key: those that an earlier start kept, or computed and kept now."""
        if self.folder is None:
            return compute()
        place = self.folder / f"{key}.safetensors"
        if place.is_file():
            return load_file(place)
        found = {name: tensor.contiguous() for name, tensor in compute().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        save_file(found, unfinished)
        unfinished.rename(place)
        return found

    def clear(self) -> None:
        """The batch is whole and kept elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


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


def labels_for(lalm: LALM, labels: Labels | Sequence[str], prompts: Sequence[Prompt], whole: bool = False) -> Labels:
    """Label words as tokens, in the form that goes on from the prompts' opened answers, told apart by their first.

    Args:
        whole: all their tokens will be read, so that labels may begin alike.

    Raises:
        LabelError: two of them begin with the same token, without ``whole``.
    """
    if not isinstance(labels, Labels):
        labels = lalm.labels(labels, form_after(prompt.answer for prompt in prompts))
    if not whole:
        labels.check_first()  # before the work starts
    return labels


def sweep(
    samples: Sequence[Any],
    compute: Callable[[Sequence[Any], Desk], P],
    kind: type[P],
    *,
    header: Header,
    batch_size: int,
    folder: str | os.PathLike[str] | None,
    progress: bool,
) -> P:
    """Run ``compute`` over all samples in batches and join what it returns.

    Args:
        samples: `Sample` objects, or other dataclasses of prompts (`Pair`).
        compute: takes a batch of samples and its desk.
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
        task = bar.add_task(header.recipe, total=len(samples), cells=0)
        for start in range(0, len(samples), batch_size):
            batch = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
            place = None if folder is None else Path(folder) / part_key(header, batch)

            def advance(cells: int, of: int, share: float = len(batch)) -> None:
                bar.update(task, advance=share * cells / of, cells=bar.tasks[0].fields["cells"] + cells)

            parts.append(_stored(batch, compute, kind, place, advance))
            bar.update(task, completed=start + len(batch))
    return kind.concat(parts)


def _stored(
    batch: Sequence[Any],
    compute: Callable[[Sequence[Any], Desk], P],
    kind: type[P],
    place: Path | None,
    advance: Callable[[int, int], None],
) -> P:
    if place is None:
        return _halving(batch, compute, kind, Desk(None, advance))
    if place.is_dir():
        return kind.load(place)
    desk = Desk(place.with_suffix(".desk"), advance)
    part = _halving(batch, compute, kind, desk)
    part.save(place)
    desk.clear()
    return part


def _halving(batch: Sequence[Any], compute: Callable[[Sequence[Any], Desk], P], kind: type[P], desk: Desk) -> P:
    try:
        return compute(batch, desk)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside the except block: there the error would still hold the tensors of the failed pass.
    middle = len(batch) // 2
    halves = []
    for number, half in enumerate((batch[:middle], batch[middle:])):
        of_half = None if desk.folder is None else desk.folder / f"half {number}"
        halves.append(_halving(half, compute, kind, Desk(of_half, desk.advance)))
    return kind.concat(halves)


def part_key(header: Header, batch: Sequence[Any]) -> str:
    """A name for what decides a batch's numbers: equal key, equal numbers."""
    described = [asdict(header), [_describe(sample) for sample in batch]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


def _describe(value: Any) -> Any:
    """A sample, or a pair of prompts, as JSON; a clip by its audio."""
    if isinstance(value, Prompt):
        words = [value.question, value.options, value.answer, value.system, value.attribute]
        return [[clip.digest for clip in value.clips], words]
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _describe(getattr(value, one.name)) for one in fields(value)}
    return value


class _Rate(ProgressColumn):
    """Cells per second: a cell is one edited pass, or one clip where nothing is edited."""

    def render(self, task: Task) -> Text:
        cells = task.fields["cells"]
        return Text(
            f"{cells / task.elapsed:.1f} cells/s" if task.elapsed and cells else "", style="progress.data.speed"
        )


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

"""A model that lives with an edit: it traces, answers and generates as if its blocks had always worked so.

The edited model is a twin: modules, classes and names of its own around the very same weights. The model itself is not
touched, whatever happens inside the context. The edit is part of the twin's blocks: a trace reads a block's output as
edited, and so does what runs outside a trace, such as whole labels. (nnsight's stored edits know nothing of the
latter, and fail in a trace that stops before it reaches them. Hooks change what a block gives only after a trace has
read it.)

The edit belongs to positions of one batch, and so does the twin. It is made whenever the prompt is processed: once with
a key-value cache, in every step without one. New tokens are never edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from nnsight.intervention.source import STATE
from transformers import PreTrainedModel

from audio_lens_plugin import ops
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.recipes.cells import CellError, Write
from audio_lens_plugin.spans import Role, SpanError

SITE = "hook_resid_post"


@contextmanager
def living_with(lalm: LALM, batch: PromptBatch, writes: Mapping[int, Sequence[Write]]) -> Iterator[LALM]:
    """A model whose residual stream is edited while it processes the prompts of one batch.

    Args:
        lalm: stays as it is.
        batch: the only one that the edited model takes.
        writes: edits of what leaves blocks (``hook_resid_post``), by row of the batch.

    Raises:
        CellError: inside, another batch than this one; afterwards, any.
    """
    edited = BatchTwin(lalm, _edited_module(lalm, batch, writes), batch)
    try:
        yield edited
    finally:
        edited.over = True


def positions_of(batch: PromptBatch, row: int, name: str) -> Int[torch.Tensor, " positions"]:
    """The positions of a row that have a name.

    Raises:
        SpanError: there are none.
    """
    cols = batch.at(name).row(row)
    if not len(cols):
        there = sorted({Role(role).name.lower() for role in batch.positions.roles[row].tolist()})
        played = ", ".join(clip.name for clip in batch.prompts[row].clips) or "no clip"
        raise SpanError(f"no position of row {row} ({played}) is {name!r}. Its roles: {', '.join(there)}.")
    return cols


class BatchTwin(LALM):
    """A model of its own around the same weights, for one batch, until it is `over`.

    Args:
        module: a twin of the model's (`bridge.weight_sharing_twin`).
    """

    def __init__(self, lalm: LALM, module: PreTrainedModel, batch: PromptBatch) -> None:
        super().__init__(module, lalm.processor, lalm.family, lalm.name, lalm.revision)
        self.batch_of_the_edit, self.over = batch, False

    def inputs(self, batch: PromptBatch | Mapping[str, Any]) -> dict[str, Any]:
        """As `LALM.inputs`.

        Raises:
            CellError: another batch, or the edit has ended.
        """
        tensors = batch.inputs if isinstance(batch, PromptBatch) else batch
        if self.over:
            raise CellError("this edit has ended; run the model inside the context.")
        mine = self.batch_of_the_edit.inputs
        if tensors.keys() != mine.keys() or not all(torch.equal(tensors[name].cpu(), mine[name]) for name in mine):
            raise CellError("the edit is of the positions of another batch; make one for this batch.")
        return super().inputs(batch)


def _edited_module(lalm: LALM, batch: PromptBatch, writes: Mapping[int, Sequence[Write]]) -> PreTrainedModel:
    """A twin of the module whose blocks end in the edits."""
    module = weight_sharing_twin(lalm.module)
    for layer in {write.layer for of_row in writes.values() for write in of_row}:
        here = [{**vars(write), "row": row} for row, those in writes.items() for write in those if write.layer == layer]
        place = next(name for name, one in lalm.module.named_modules() if one is lalm.blocks[layer]._module)
        _change(module.get_submodule(place), _editing(layer, here, len(batch)))
    return module


Edit = Callable[[torch.Tensor, Any], torch.Tensor]
"""What leaves a block, and the cache that now holds the block's keys and values -> what shall leave it."""


def _editing(layer: int, writes: Sequence[dict[str, Any]], rows: int) -> Edit:
    def edit(state: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache is not None and cache.get_seq_length(layer) > state.shape[1]:
            return state  # positions after the prompt
        copies = len(state) // rows  # beams
        copied = [{**one, "row": one["row"] * copies + copy} for one in writes for copy in range(copies)]
        return ops.written(state, copied, SITE, 0)

    return edit


def _change(block: torch.nn.Module, edit: Edit) -> None:
    """Give one block of the twin a class of its own, whose forward ends in the edit."""
    plain: Any = type(block)

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return edit(plain.forward(self, *args, **kwargs), kwargs.get("past_key_values"))

    for name in ("forward", STATE):  # nnsight's, copied from the model: it shall wrap the new forward instead
        block.__dict__.pop(name, None)
    block.__class__ = type(plain.__name__, (plain,), {"forward": forward})

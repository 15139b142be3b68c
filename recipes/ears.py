"""Edits of the audio tower: the vectors that a clip becomes when some frames of one block are changed.

The tower reads a clip in both directions, so every frame must run from the edited block on; the blocks below it need
not, their states come from a stored run. What comes out is a set of vectors at the clip's audio positions. Writing them
into the language model's first block is then an ordinary cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.recipes.cells import CellError, Run

FRAMES_PER_SECOND = 50
"""Of a Whisper-style tower: mel frames of 10 ms, and a convolution of stride 2."""


@dataclass(frozen=True, eq=False)
class EarWrite:
    """New states of some frames of a row's only clip.

    Attributes:
        row: row of the run.
        layer: block of the tower whose output is written, from 0.
        frames: frames of 20 ms.
        values: their new states.
    """

    row: int
    layer: int
    frames: Int[torch.Tensor, " frames"]
    values: Float[torch.Tensor, "frames d"]


def frames_of(seconds: float, stretch: tuple[float, float] | None = None) -> Int[torch.Tensor, " frames"]:
    """The tower's frames of a clip, or of a stretch of it, in seconds."""
    start, end = stretch or (0.0, seconds)
    last = max(int(min(end, seconds) * FRAMES_PER_SECOND), int(start * FRAMES_PER_SECOND) + 1)
    return torch.arange(int(start * FRAMES_PER_SECOND), last)


def hear(
    lalm: LALM, run: Run, writes: Sequence[EarWrite], batch_size: int = 8, truncate: bool = False
) -> list[Float[torch.Tensor, "positions d_model"]]:
    """The vectors at a row's audio positions after each edit.

    Args:
        run: stored with ``tower=True``, one clip per row.

    Raises:
        CellError: rows with another number of clips, or a tower that takes all clips as one sequence.
    """
    rows = [len(prompt.clips) for prompt in run.batch.prompts]
    if set(rows) != {1}:
        raise CellError(f"the audio tower is edited in prompts of one clip each; these have {rows}.")
    if len(run.tower[0]) != len(rows):
        raise CellError(f"the audio tower of {lalm.family.name} has no axis of clips, so one cannot be edited alone.")
    found: dict[int, torch.Tensor] = {}
    for row in dict.fromkeys(write.row for write in writes):
        order = sorted((i for i, write in enumerate(writes) if write.row == row), key=lambda i: writes[i].layer)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            found |= dict(zip(chunk, _heard(lalm, run, [writes[i] for i in chunk], truncate), strict=True))
    return [found[index] for index in range(len(writes))]


def _heard(lalm: LALM, run: Run, writes: Sequence[EarWrite], truncate: bool) -> list[torch.Tensor]:
    """Edits of one row, in one pass of the tower."""
    row = writes[0].row
    batch = lalm.batch([run.batch.prompts[row]] * len(writes), truncate)
    cols = batch.at("audio").row(0)
    states = [state[row : row + 1] for state in run.tower]
    plain = [{"layer": write.layer, "frames": write.frames, "values": write.values} for write in writes]
    with torch.no_grad(), lalm.trace(batch, use_cache=False) as tracer:
        ops.rerun_tower(lalm.audio_encoder.blocks, states, plain)
        vectors = save(lalm.blocks[0].input[:, cols])
        tracer.stop()
    return list(vectors)

"""What goes into a model, before it is a tensor and after: a `Prompt` is one row, a `PromptBatch` the labelled inputs.

The step from one to the other:

    clips + question + open answer  --(patch.build_batch)-->  input ids, audio tensors, and the role of every position
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape

import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.spans import Positions, Role, Selection

SHOWN_ROWS = 8


class PromptError(ValueError):
    """A prompt, or prepared tensors, that the model would misread."""


@dataclass(frozen=True)
class Prompt:
    """One row: what is played, what is asked, and how the answer begins.

    Attributes:
        clips: the recordings, in order; may be none.
        question: the user's words after the clips.
        options: possible answers, named after the question.
        answer: the assistant's turn, left open: the model goes on from its last token.
        system: the system turn; None is the family's default.
        attribute: the word in answer or question that names the attribute ("animal").
    """

    clips: tuple[Clip, ...] = ()
    question: str | None = None
    options: tuple[str, ...] | None = None
    answer: str | None = None
    system: str | None = None
    attribute: str | None = None

    @property
    def words(self) -> str | None:
        """The user's text: the question, then the options."""
        if self.options is None:
            return self.question
        listed = f"Possible options: {', '.join(self.options)}."
        return listed if self.question is None else f"{self.question} {listed}"


@dataclass(frozen=True)
class Sample:
    """A prompt whose right answer is known: a row of an experiment."""

    name: str
    prompt: Prompt
    label: str

    def silenced(self) -> Sample:
        """The control: the same words over silence of the same length."""
        return replace(self, prompt=replace(self.prompt, clips=tuple(clip.silenced() for clip in self.prompt.clips)))


@dataclass(frozen=True, repr=False)
class PromptBatch:
    """Left-padded model inputs whose every position is labelled. ``print`` it to see them.

    Attributes:
        prompts: the rows.
        inputs: what the model's forward takes: ``input_ids`` and ``attention_mask`` [batch, pos], audio tensors.
        positions: role, text and seconds of every position.
    """

    prompts: tuple[Prompt, ...]
    inputs: dict[str, torch.Tensor]
    positions: Positions

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def shape(self) -> torch.Size:
        """Batch rows and positions, as of the token ids; it lets TransformerLens's patching take a batch for tokens."""
        return self.inputs["input_ids"].shape

    def at(self, name: str, seconds: tuple[float, float] | None = None) -> Selection:
        """Positions by name: see `audio_lens_plugin.spans`."""
        return self.positions.at(name, seconds)

    def __repr__(self) -> str:
        return "\n\n".join(self._lines(row) for row in range(min(len(self), SHOWN_ROWS))) + self._unshown()

    def _repr_html_(self) -> str:
        return f"<pre style='line-height:1.35'>{escape(str(self))}</pre>"

    def _unshown(self) -> str:
        hidden = len(self) - SHOWN_ROWS
        return f"\n\n... and {hidden} more rows" if hidden > 0 else ""

    def _lines(self, row: int) -> str:
        positions = self.positions
        length, padding = positions.roles.shape[1], int((positions.roles[row] == Role.PAD).sum())
        clips = ", ".join(f"{clip.name} ({clip.seconds:.2f} s)" for clip in self.prompts[row].clips) or "no clip"
        lines = [f"row {row}: {length} positions, {padding} of them padding; {clips}"]
        for run in positions.runs(row, torch.arange(length)):
            first, past = int(run[0]), int(run[-1]) + 1
            place = f"{first}" if past == first + 1 else f"{first}-{past - 1}"
            lines.append(
                f"{place:>9}  {positions.role_name(row, first):<11} {self._time(row, first, past):<13} "
                f"{self._tokens(row, first, past)}".rstrip()
            )
        return "\n".join(lines)

    def _time(self, row: int, first: int, past: int) -> str:
        start, end = float(self.positions.seconds[row, first, 0]), float(self.positions.seconds[row, past - 1, 1])
        return "" if start != start else f"{start:.2f}-{end:.2f} s"  # NaN is not equal to itself

    def _tokens(self, row: int, first: int, past: int) -> str:
        role = self.positions.roles[row, first]
        if role == Role.PAD:
            return ""
        if role == Role.AUDIO:
            return f"{self.positions.token_text(row, first)} × {past - first}"
        return "|".join(self.positions.token_text(row, col).replace("\n", "⏎") for col in range(first, past))

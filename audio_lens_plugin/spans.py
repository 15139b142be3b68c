"""Every position of the sequence the model sees has a role, a text, and for audio a stretch of seconds.

`Positions` is the map of one batch, made by a model family when it builds a prompt. It answers one question:
*which positions are ...?* The question is asked with a name, never with a bare index:

    positions.at("last")                          the last position of each row: where the answer is decided
    positions.at("audio")                         all audio positions;  "audio[1]": those of the second clip
    positions.at("audio", seconds=(0.4, 0.9))     those that hear this part of the clip; the same in one string:
    positions.at("audio@0.4-0.9")                 for recipes and the command line; "audio[1]@0.4-0.9", too
    positions.at("question")                      every role is a name: pad, template, system, transcript, answer, ...
    positions.at("text")                          everything that is read, not heard;  "all": audio and text
    positions.at("attribute")                     the word that names the attribute, where the prompt declared one
    positions.at("spoken language")               any word or substring of the words in the prompt

The answer is a `Selection`: one (row, position) pair per entry, so rows of different length need no special case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float, Int

AUDIO_NAME = re.compile(r"audio(?:\[(\d+)\])?")
STRETCH = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")


class Role(IntEnum):
    """What a position is. Every position has exactly one role."""

    PAD = 0
    TEMPLATE = 1
    SYSTEM = 2
    AUDIO = 3
    TRANSCRIPT = 4
    QUESTION = 5
    ANSWER = 6


WORDS = (Role.SYSTEM, Role.TRANSCRIPT, Role.QUESTION, Role.ANSWER)
ROLE_NAMES = {role.name.lower(): role for role in Role}


class SpanError(ValueError):
    """A name that no position of the batch answers to."""


@dataclass(frozen=True)
class Selection:
    """Positions of a batch, one entry per position, rows in order.

    Attributes:
        name: what was asked for.
        rows: batch row of each entry.
        cols: position in the sequence of each entry, counted with the padding.
    """

    name: str
    rows: Int[torch.Tensor, " entries"]
    cols: Int[torch.Tensor, " entries"]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Int[torch.Tensor, " positions"]:
        """The positions in one batch row."""
        return self.cols[self.rows == index]


@dataclass(frozen=True)
class RowText:
    """One row's text, where its words lie, and which of them names the attribute.

    Attributes:
        text: the rendered prompt, audio placeholders expanded.
        offsets: first and past-the-last character of each position; (0, 0) for padding.
        attribute: the word that names the attribute, or None.
    """

    text: str
    offsets: tuple[tuple[int, int], ...]
    attribute: str | None = None


@dataclass(frozen=True)
class Positions:
    """The labelled positions of one batch (see the module's text).

    Attributes:
        roles: a `Role` per position.
        clips: which of its row's clips a position hears, counted from 0; -1 where it hears none.
        seconds: start and end in its clip of what an audio position hears; NaN where there is no time.
        row_texts: the text of each row.
    """

    roles: Int[torch.Tensor, "batch pos"]
    clips: Int[torch.Tensor, "batch pos"]
    seconds: Float[torch.Tensor, "batch pos 2"]
    row_texts: tuple[RowText, ...]

    def __len__(self) -> int:
        return len(self.row_texts)

    def at(self, name: str, seconds: tuple[float, float] | None = None) -> Selection:
        """Positions by name.

        Args:
            name: a role, ``audio[k]``, ``audio@start-end``, ``last``, ``text``, ``all``, ``attribute``, or a word or
                substring of the prompt's words.
            seconds: keep the audio positions that hear some of this half-open stretch, in seconds of their clip.

        Raises:
            SpanError: nothing in the batch has this name, or ``seconds`` is asked where there is no time.
        """
        what, seconds = _with_seconds(name, seconds)
        mask = self._named(what)
        if seconds is not None:
            mask = mask & self._heard_during(what, seconds)
        rows, cols = mask.nonzero(as_tuple=True)
        if len(rows) == 0:
            stretch = "" if seconds is None else f" between {seconds[0]:g} s and {seconds[1]:g} s"
            raise SpanError(f"no position is {what!r}{stretch}. {self._what_there_is()}")
        return Selection(name, rows, cols)

    def token_text(self, row: int, col: int) -> str:
        """The text of one position."""
        start, end = self.row_texts[row].offsets[col]
        return self.row_texts[row].text[start:end]

    def role_name(self, row: int, col: int) -> str:
        """The role of one position in words; of an audio position also which clip it hears: ``audio[0]``."""
        role = Role(int(self.roles[row, col]))
        return f"audio[{int(self.clips[row, col])}]" if role is Role.AUDIO else role.name.lower()

    def runs(self, row: int, cols: Int[torch.Tensor, " positions"]) -> list[Int[torch.Tensor, " _"]]:
        """Some positions of a row, in order, cut into stretches of neighbours with one role and one clip."""
        ahead = cols - torch.arange(len(cols))  # grows where a position is left out
        marks = torch.stack([self.roles[row, cols], self.clips[row, cols], ahead])
        cuts = (marks[:, 1:] != marks[:, :-1]).any(dim=0).nonzero()[:, 0] + 1
        return [run for run in torch.tensor_split(cols, cuts) if len(run)]

    def _named(self, name: str) -> torch.Tensor:
        if name in ROLE_NAMES:
            return self.roles == ROLE_NAMES[name]
        if match := AUDIO_NAME.fullmatch(name):
            return (self.roles == Role.AUDIO) & (self.clips == int(match[1]))
        if name == "all":
            return self.roles != Role.PAD
        if name == "text":
            return (self.roles != Role.PAD) & (self.roles != Role.AUDIO)
        if name == "last":
            return self._last()
        if name == "attribute":
            return self._attribute()
        return self._containing([name] * len(self))

    def _last(self) -> torch.Tensor:
        real = self.roles != Role.PAD
        order = torch.arange(self.roles.shape[1])
        last = torch.where(real, order, -1).max(dim=1).values
        return order[None] == last[:, None]

    def _attribute(self) -> torch.Tensor:
        words = [text.attribute for text in self.row_texts]
        if not any(words):
            raise SpanError("no prompt of this batch declares its attribute; build it with attribute='...'.")
        everywhere = self._containing(words)
        answer = everywhere & (self.roles == Role.ANSWER)
        return torch.where(answer.any(dim=1, keepdim=True), answer, everywhere & (self.roles == Role.QUESTION))

    def _containing(self, words: Sequence[str | None]) -> torch.Tensor:
        """Positions of the row's word among the prompt's words: as a whole word if it stands there, else in others."""
        found = torch.zeros_like(self.roles, dtype=torch.bool)
        for row, word in enumerate(words):
            if word:
                whole = self._matching(row, rf"(?<!\w){re.escape(word)}(?!\w)")
                found[row] = whole if whole.any() else self._matching(row, re.escape(word))
        return found

    def _matching(self, row: int, pattern: str) -> torch.Tensor:
        """Positions of one row, outside template and audio, whose characters overlap a match."""
        content = self.row_texts[row]
        matches = [match.span() for match in re.finditer(pattern, content.text)]
        overlaps = [any(first < end and start < past for start, end in matches) for first, past in content.offsets]
        spoken = torch.isin(self.roles[row], torch.tensor([int(role) for role in WORDS]))
        return torch.tensor(overlaps) & spoken

    def _heard_during(self, name: str, seconds: tuple[float, float]) -> torch.Tensor:
        start, end = seconds
        if not start < end:
            raise SpanError(f"seconds=({start:g}, {end:g}) is no stretch of time: its end must come after its start.")
        if not AUDIO_NAME.fullmatch(name):
            raise SpanError(f"only audio positions have seconds; {name!r} has none.")
        if bool((self.roles == Role.AUDIO).any()) and bool(self.seconds.isnan().all()):
            raise SpanError("the audio positions of this model keep no time: ask for 'audio' without seconds.")
        return (self.seconds[..., 0] < end) & (self.seconds[..., 1] > start)

    def _what_there_is(self) -> str:
        roles = [name for name, role in ROLE_NAMES.items() if bool((self.roles == role).any())]
        further = "last, text, all, attribute, audio[k], audio@0.4-0.9 (seconds), any word of the prompt"
        return f"Roles here: {', '.join(roles)}; further names: {further}."


def _with_seconds(name: str, seconds: tuple[float, float] | None) -> tuple[str, tuple[float, float] | None]:
    """What ``audio@0.4-0.9`` stands for; any other name as it is."""
    what, mark, stretch = name.partition("@")
    if not (mark and AUDIO_NAME.fullmatch(what)):
        return name, seconds
    if seconds is not None:
        raise SpanError(f"{name!r} says its seconds already; leave out seconds=.")
    match = STRETCH.fullmatch(stretch)
    if match is None:
        raise SpanError(f"{name!r} is no stretch of a clip: write its start and end in seconds, as in {what}@0.4-0.9.")
    return what, (float(match[1]), float(match[2]))

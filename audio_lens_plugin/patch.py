"""The contract of a model family: what a file in patches/ gives so that every recipe runs on its models.

A prompt becomes positions in four steps, and a family says only what is its own in each:

1. `Family.render`        the chat text as the real model has it, cut into segments of one role each
2. `Family.hear`          clips become the model's audio tensors, and the number of positions each clip will take
3. `build_batch` (shared) placeholders are expanded, the text is tokenised once, every position gets its role
4. `Family.verify`        tensors whose audio would be dropped, cut or unexpanded are refused before the model runs

To add a family: one file in patches/ with a `Family` subclass and `FAMILY = ThatClass()`. Nothing else is edited; the
tests in tests/patches run over every family they find. A family's modules are named once, by its TransformerLens
adapter (`Family.adapter`), and nnsight's names are derived from it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Prompt, PromptBatch, PromptError
from audio_lens_plugin.spans import Positions, Role, RowText

SYSTEM_MARK, QUESTION_MARK = "\ue000", "\ue001"  # stand for the words while a chat template is rendered


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt's text with one role; an audio segment is one placeholder and stands for one clip."""

    text: str
    role: Role


@dataclass(frozen=True)
class Heard:
    """Clips as the model takes them: named tensors, and how many positions each clip takes in the sequence."""

    tensors: dict[str, torch.Tensor]
    counts: tuple[int, ...]


class Family(ABC):
    """What one model family says about itself (see the module's text).

    Class attributes:
        name: the family's short name.
        architectures: transformers' class names that it serves.
        repo_ids: published checkpoints, the first being the one to try.
        verified: one honest sentence: what was checked, and against what.
        audio_token: the placeholder that stands for a clip in the text.
        positions_per_second: audio positions per second of clip; None where the model keeps no time.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    repo_ids: ClassVar[tuple[str, ...]]
    verified: ClassVar[str]
    audio_token: ClassVar[str]
    positions_per_second: ClassVar[float | None]

    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The transformers class to load."""

    @abstractmethod
    def adapter(self) -> type:
        """The TransformerLens `ArchitectureAdapter` that names the modules, for every library."""

    @abstractmethod
    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        """The whole text of a prompt in order, one audio segment per clip, the answer left open at its end.

        `fill_template` cuts a chat template into segments.
        """

    @abstractmethod
    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        """Clips as tensors.

        Raises:
            AudioError: a clip outside the model's window.
        """

    @abstractmethod
    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """Refuse tensors whose audio would be dropped, cut, or expanded inside the model.

        Raises:
            PromptError: says what does not fit.
        """

    @abstractmethod
    def entrance(self, name: str) -> str:
        """The module (TransformerLens name) that takes the input ``name``: it decides the input's device."""


def build_batch(family: Family, processor: Any, prompts: Sequence[Prompt], truncate: bool = False) -> PromptBatch:
    """Tokenise prompts into one left-padded batch and label every position.

    Args:
        truncate: cut clips that are longer than the model's window, with a warning, instead of refusing them.

    Raises:
        PromptError: an empty batch or prompt, or words that contain the audio placeholder or another special token.
        AudioError: a clip outside the model's window.
    """
    if not prompts:
        raise PromptError("a batch needs at least one prompt.")
    for row, prompt in enumerate(prompts):
        _check_words(family, processor, row, prompt)
    heard = family.hear(processor, [clip for prompt in prompts for clip in prompt.clips], truncate)
    rows, first = [], 0
    for prompt in prompts:
        counts = heard.counts[first : first + len(prompt.clips)]
        rows.append(_expand(family.render(processor, prompt), counts))
        first += len(prompt.clips)
    encoding = processor.tokenizer(
        [row.text for row in rows],
        padding=True,
        padding_side="left",
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    positions = _label(family, prompts, rows, encoding)
    inputs = {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"], **heard.tensors}
    return PromptBatch(tuple(prompts), inputs, positions)


@dataclass(frozen=True)
class Row:
    """One row's expanded text; role and clip index (-1: none) of each character; positions of each clip."""

    text: str
    chars: list[tuple[Role, int]]
    counts: tuple[int, ...]


def _check_words(family: Family, processor: Any, row: int, prompt: Prompt) -> None:
    if not (prompt.clips or prompt.words or prompt.answer):
        raise PromptError(f"prompt {row} is empty: give it a clip, a question or an answer.")
    special = set(processor.tokenizer.all_special_tokens) | {family.audio_token}
    for field in ("system", "words", "answer"):
        found = [token for token in special if token in (getattr(prompt, field) or "")]
        if found:
            raise PromptError(f"prompt {row}: its {field} contain the special token {found[0]!r}; pass clips as clips.")


def fill_template(template: str, audio_token: str, system: str, words: str | None) -> list[Segment]:
    """Cut a chat template that was rendered with `SYSTEM_MARK` and `QUESTION_MARK` into segments, and put the words in.

    The words never pass through the template, so nothing that they contain can be taken for a part of it.

    Raises:
        PromptError: the template lost a mark, or uses it twice.
    """
    meaning = {SYSTEM_MARK: Segment(system, Role.SYSTEM), audio_token: Segment(audio_token, Role.AUDIO)}
    if words:
        meaning[QUESTION_MARK] = Segment(words, Role.QUESTION)
    for mark, segment in meaning.items():
        if mark != audio_token and template.count(mark) != 1:
            raise PromptError(
                f"the chat template has {template.count(mark)} places for the {segment.role.name.lower()}."
            )
    pieces = re.split("(" + "|".join(map(re.escape, meaning)) + ")", template)
    return [meaning.get(piece, Segment(piece, Role.TEMPLATE)) for piece in pieces]


def _expand(segments: Sequence[Segment], counts: Sequence[int]) -> Row:
    """The text with every placeholder repeated to its clip's count, and the role of each of its characters."""
    text, chars, clip = "", [], -1
    for segment in segments:
        if segment.role is Role.AUDIO:
            clip += 1
        repeats = counts[clip] if segment.role is Role.AUDIO else 1
        text += segment.text * repeats
        chars += [(segment.role, clip if segment.role is Role.AUDIO else -1)] * (len(segment.text) * repeats)
    if clip + 1 != len(counts):
        raise PromptError(f"the chat template has {clip + 1} audio placeholders for {len(counts)} clips.")
    return Row(text, chars, tuple(counts))


def _label(family: Family, prompts: Sequence[Prompt], rows: Sequence[Row], encoding: Any) -> Positions:
    mask = encoding["attention_mask"]
    roles = torch.full(mask.shape, int(Role.PAD))
    clips = torch.full(mask.shape, -1)
    seconds = torch.full((*mask.shape, 2), float("nan"))
    texts = []
    for row, (prompt, content) in enumerate(zip(prompts, rows, strict=True)):
        offsets = [tuple(pair) for pair in encoding["offset_mapping"][row].tolist()]
        for col in mask[row].nonzero().flatten().tolist():
            start, past = offsets[col]
            # A token belongs where its last character does: a leading space is the sentence before it. Tokens that
            # the tokenizer adds (a BOS) cover no character and are template.
            role, clip = content.chars[past - 1] if past > start else (Role.TEMPLATE, -1)
            roles[row, col], clips[row, col] = int(role), clip
        _check_counts(family, row, clips[row], content.counts)
        if family.positions_per_second is not None:
            for clip, count in enumerate(content.counts):
                edges = torch.arange(count + 1) / family.positions_per_second
                seconds[row, clips[row] == clip] = torch.stack([edges[:-1], edges[1:]], dim=-1)
        texts.append(RowText(content.text, tuple(offsets), prompt.attribute))
    return Positions(roles, clips, seconds, tuple(texts))


def _check_counts(family: Family, row: int, clips: torch.Tensor, counts: Sequence[int]) -> None:
    for clip, count in enumerate(counts):
        found = int((clips == clip).sum())
        if found != count:
            raise PromptError(
                f"row {row}: clip {clip} takes {count} positions but the tokenizer made {found}; "
                f"is {family.audio_token!r} one special token of this tokenizer?"
            )


def nnsight_names(components: Mapping[str, Any]) -> dict[str, str]:
    """nnsight's ``rename`` from an adapter's component mapping: one description of a model for both libraries.

    A top-level component is bound by its full path (``model.language_model.layers`` is ``blocks``), a nested one by the
    single name it has inside its parent (``self_attn`` is ``attn``), which binds wherever it resolves.
    """
    names: dict[str, str] = {}
    for alias, component in components.items():
        if component.name:
            names[component.name] = alias
            names |= _nested_names(component.submodules)
    return names


def _nested_names(submodules: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for alias, component in submodules.items():
        if component.name and re.fullmatch(r"\w+", component.name) and component.name != alias:
            names[component.name] = alias
        names |= _nested_names(component.submodules)
    return names

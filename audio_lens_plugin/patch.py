"""The contract of a model family: what a file in patches/ gives so that every recipe runs on its models.

A prompt becomes positions in four steps, and a family says only what is its own in each:

1. `Family.render`        the chat text as the real model has it, cut into segments of one role each
2. `Family.hear`          clips become the model's audio tensors, and the number of positions each clip will take
3. `build_batch` (shared) placeholders are expanded, the text is tokenised, every position gets its role
4. `Family.verify`        tensors whose audio would be dropped, cut or unexpanded are refused before the model runs

A family whose language model also reads a transcription of the clip says so (`Family.transcribes`) and makes it when
asked (`Family.transcribe`); `render` then finds it in ``clip.transcript``.

To add a family: one file (or one folder) in patches/ with a `Family` subclass and `FAMILY = ThatClass()`. Nothing else
is edited; the tests in tests/patches run over every family they find. A family's modules are named once, by its
TransformerLens adapter (`Family.adapter`), and nnsight's names are derived from it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from transformers import AutoProcessor, PreTrainedModel

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Prompt, PromptBatch, PromptError
from audio_lens_plugin.spans import Positions, Role, RowText

SYSTEM_MARK, QUESTION_MARK = "\ue000", "\ue001"  # stand for the words while a chat template is rendered


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt's text with one role; an audio segment is one placeholder and stands for one clip.

    Attributes:
        text: as the model reads it, special tokens (a BOS, too) written out.
        role: the role of its positions.
        apart: tokenised on its own, so that no token reaches over its borders. For models whose published code
            tokenises a prompt piece by piece.
    """

    text: str
    role: Role
    apart: bool = False


@dataclass(frozen=True)
class Heard:
    """Clips as the model takes them: named tensors, and how many positions each clip takes in the sequence."""

    tensors: dict[str, torch.Tensor]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the module, its processor, and transformers' loading report (missing keys, ...)."""

    module: PreTrainedModel
    processor: Any
    report: Mapping[str, Any]


class Family(ABC):
    """What one model family says about itself (see the module's text).

    Attributes:
        name: the family's short name.
        architectures: transformers' class names that it serves.
        repo_ids: published checkpoints, the first being the one to try.
        verified: one honest sentence: what was checked, and against what.
        audio_token: the placeholder that stands for a clip in the text.
        positions_per_second: audio positions per second of clip; None where the model keeps no time.
        transcribes: whether the language model also reads a transcription of each clip.
        options: further keywords of `loading.load` that this family understands.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    repo_ids: ClassVar[tuple[str, ...]]
    verified: ClassVar[str]
    audio_token: ClassVar[str]
    positions_per_second: ClassVar[float | None]
    transcribes: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()

    def serves(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this configuration (as in its config.json) belongs to the family."""
        return bool(set(config.get("architectures") or ()) & set(self.architectures))

    def load(self, source: str, revision: str | None, **kwargs: Any) -> Loaded:
        """Model and processor of a checkpoint.

        Args:
            source: a folder or a repo id.
            revision: branch, tag or commit of a repo.
            kwargs: ``dtype``, ``device_map``, ``attn_implementation`` as transformers takes them, where they were
                given, and the family's own `options`.
        """
        module, report = self.model_class().from_pretrained(
            source, revision=revision, output_loading_info=True, **kwargs
        )
        return Loaded(module, self.load_processor(source, revision), report)

    def load_processor(self, source: str, revision: str | None) -> Any:
        """The checkpoint's processor: what `render` and `hear` are given, with a fast ``tokenizer``."""
        return AutoProcessor.from_pretrained(source, revision=revision)

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

    def transcribe(self, module: PreTrainedModel, processor: Any, clips: Sequence[Clip], truncate: bool) -> list[str]:
        """The words of each clip, as the model itself hears them; asked only where `transcribes` is true."""
        raise NotImplementedError(f"{self.name} makes no transcriptions.")

    @abstractmethod
    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """Refuse tensors whose audio would be dropped, cut, or expanded inside the model.

        Raises:
            PromptError: says what does not fit.
        """

    @abstractmethod
    def entrance(self, name: str) -> str:
        """The module (TransformerLens name) that takes the input ``name``: it decides the input's device."""


class PooledEars(Family):
    """A family that hears as most do: Whisper's features and their mask, pooled to 25 positions per second.

    Attributes:
        mask_name: what the model calls the mask of the frames.
        shortest: seconds that a clip must have at least.
    """

    mask_name: ClassVar[str] = "feature_attention_mask"
    shortest: ClassVar[float] = 0.04  # one position
    positions_per_second = 25.0

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        features, mask = mel_features(processor.feature_extractor, clips, self.shortest, truncate)
        return Heard({"input_features": features, self.mask_name: mask}, tuple(pooled_positions(mask).tolist()))

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        mask: Any = inputs.get(self.mask_name)
        check_placeholders(
            inputs, module.config.audio_token_id, lambda: int(pooled_positions(mask).sum()), self.mask_name
        )

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name in ("input_features", self.mask_name) else "embed"


def pooled_positions(frames_mask: Int[torch.Tensor, "clips frames"]) -> Int[torch.Tensor, " clips"]:
    """Positions per clip from its count of 10 ms mel frames: a stride-2 convolution, then pooling by two."""
    return (((frames_mask.sum(-1) - 1) // 2 + 1) - 2) // 2 + 1


def mel_features(
    extractor: Any, clips: Sequence[Clip], shortest: float, truncate: bool
) -> tuple[Float[torch.Tensor, "clips mel frames"], Int[torch.Tensor, "clips frames"]]:
    """Log-mel features of clips, each padded to the extractor's window, and a mask of the frames that are the clip's.

    Args:
        extractor: a Whisper feature extractor.
        shortest: seconds that a clip must have at least.

    Raises:
        AudioError: a clip outside the window.
    """
    rate = extractor.sampling_rate
    ready = [clip.at_rate(rate).within(shortest, extractor.chunk_length, truncate).waveform for clip in clips]
    # Said in the call, the mask counts frames; left to the extractor's default, it counts samples.
    features = extractor(
        ready, sampling_rate=rate, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    return features["input_features"], features["attention_mask"].contiguous().clone()


def check_placeholders(
    inputs: Mapping[str, Any], audio_token_id: int, positions: Callable[[], int], *companions: str
) -> None:
    """Refuse text and audio that do not fit each other: the audio would be dropped, cut, or spread wrongly.

    Args:
        inputs: what the model is about to be given.
        positions: how many positions the given audio takes; asked only where there is audio.
        companions: further tensors that must come with ``input_features``.

    Raises:
        PromptError: says what does not fit.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        return
    in_text = int((ids == audio_token_id).sum())
    if inputs.get("input_features") is None:
        if in_text:
            raise PromptError(f"the text has {in_text} audio tokens but no input_features: the audio would be lost.")
        return
    for name in companions:
        if inputs.get(name) is None:
            raise PromptError(f"input_features need their {name}: clip lengths are unknown without it.")
    if in_text != positions():
        raise PromptError(
            f"the text has {in_text} audio tokens for {positions()} audio positions. Placeholders must be expanded and "
            "uncut before the model runs: build prompts with lalm.prompt(...), and do not limit their length."
        )


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
        rows.append(encode_row(processor.tokenizer, family.render(processor, prompt), counts))
        first += len(prompt.clips)
    padded = processor.tokenizer.pad(
        {"input_ids": [row.ids for row in rows]}, padding_side="left", return_attention_mask=True, return_tensors="pt"
    )
    positions = _label(family, prompts, rows, padded["attention_mask"])
    inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], **heard.tensors}
    return PromptBatch(tuple(prompts), inputs, positions)


@dataclass(frozen=True)
class Row:
    """One row, tokenised.

    Attributes:
        text: the whole text, placeholders expanded.
        chars: role and clip index (-1: none) of each of its characters.
        counts: positions of each clip.
        ids: token ids.
        offsets: first and past-the-last character of each token.
    """

    text: str
    chars: list[tuple[Role, int]]
    counts: tuple[int, ...]
    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_row(tokenizer: Any, segments: Sequence[Segment], counts: Sequence[int]) -> Row:
    """Expand each placeholder to its clip's count of positions, and tokenise.

    Raises:
        PromptError: another number of placeholders than of counts.
    """
    text, chars, borders, clip = "", [], {0}, -1
    for segment in segments:
        clip += segment.role is Role.AUDIO
        repeats = counts[clip] if segment.role is Role.AUDIO and clip < len(counts) else 1
        start = len(text)
        text += segment.text * repeats
        chars += [(segment.role, clip if segment.role is Role.AUDIO else -1)] * (len(text) - start)
        if segment.apart:
            borders |= {start, len(text)}
    if clip + 1 != len(counts):
        raise PromptError(f"the chat template has {clip + 1} audio placeholders for {len(counts)} clips.")
    ids, offsets = [], []
    for start, past in pairwise(sorted(borders | {len(text)})):
        piece = tokenizer(text[start:past], add_special_tokens=False, return_offsets_mapping=True)
        ids += piece["input_ids"]
        offsets += [(start + first, start + end) for first, end in piece["offset_mapping"]]
    return Row(text, chars, tuple(counts), ids, offsets)


def _check_words(family: Family, processor: Any, row: int, prompt: Prompt) -> None:
    if not (prompt.clips or prompt.words or prompt.answer):
        raise PromptError(f"prompt {row} is empty: give it a clip, a question or an answer.")
    special = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab(), family.audio_token}
    for field in ("system", "words", "answer"):
        found = [token for token in special if token in (getattr(prompt, field) or "")]
        if found:
            raise PromptError(f"prompt {row}: its {field} contain the special token {found[0]!r}; pass clips as clips.")
    given = [clip.name for clip in prompt.clips if clip.transcript is not None]
    if given and not family.transcribes:
        raise PromptError(f"prompt {row}: {given[0]} has a transcript, but {family.name} models read none.")


def from_chat_template(
    processor: Any, prompt: Prompt, audio_token: str, system: str, messages: Sequence[Mapping[str, Any]]
) -> list[Segment]:
    """A prompt's segments as a processor's own chat template lays them out.

    Args:
        system: the family's system turn, where the prompt has none.
        messages: the conversation, with `SYSTEM_MARK` and `QUESTION_MARK` for the words.
    """
    template = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    spoken = system if prompt.system is None else prompt.system
    segments = fill_template(template, audio_token, spoken, prompt.words)
    return [*segments, Segment(prompt.answer or "", Role.ANSWER)]


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


def _label(family: Family, prompts: Sequence[Prompt], rows: Sequence[Row], mask: torch.Tensor) -> Positions:
    roles = torch.full(mask.shape, int(Role.PAD))
    clips = torch.full(mask.shape, -1)
    seconds = torch.full((*mask.shape, 2), float("nan"))
    texts = []
    for row, (prompt, content) in enumerate(zip(prompts, rows, strict=True)):
        padding = mask.shape[1] - len(content.ids)
        for col, (start, past) in enumerate(content.offsets, padding):
            # A token belongs where its last character does: a leading space is the sentence before it.
            role, clip = content.chars[past - 1] if past > start else (Role.TEMPLATE, -1)
            roles[row, col], clips[row, col] = int(role), clip
        _check_counts(family, row, clips[row], content.counts)
        if family.positions_per_second is not None:
            for clip, count in enumerate(content.counts):
                edges = torch.arange(count + 1) / family.positions_per_second
                seconds[row, clips[row] == clip] = torch.stack([edges[:-1], edges[1:]], dim=-1)
        texts.append(RowText(content.text, ((0, 0),) * padding + tuple(content.offsets), prompt.attribute))
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

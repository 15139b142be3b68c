"""Prompts with their answers, as token ids a toy learns from.

A prompt is rendered by the toy's family, so that training sees to the letter what the library asks later.
It depends on the clip only through the number of audio tokens and through its transcript, where the family reads one;
each is therefore tokenized once, with one audio token, which is then repeated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import encode_row
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.toy_shelf.family import Toy
from audio_lens_plugin.tracks import TRACKS, PromptForm, Track

FORMS = tuple(form for form in PromptForm.all() if form.audio)
UNOPENED_SHARE = 0.2  # of the prompts with a user turn: the answer is not opened, the toy says the whole sentence
LABEL_WEIGHT, WORD_WEIGHT = 1.0, 0.2


@dataclass
class Batch:
    """Left-padded prompts with answers; a token's weight says how much predicting it counts, 0 for not at all."""

    ids: torch.Tensor
    attention_mask: torch.Tensor
    weights: torch.Tensor


class Prompts:
    """Makes training batches for one toy."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.tokenizer = toy.processor.tokenizer
        self.audio_id = toy.processor.audio_token_id
        self.split = cache(self._split)

    def encode(self, form: PromptForm, track: Track, answer: str, transcript: str | None) -> list[int]:
        """A prompt's ids, as the library makes them, with one audio token."""
        clip = Clip(np.zeros(1, dtype=np.float32), 1, transcript=transcript)  # what is played does not matter here
        prompt = Prompt((clip,), form.question(track), form.options(track), answer or None)
        segments = self.toy.family.render(self.toy.processor, prompt)
        return encode_row(self.tokenizer, segments, (1,)).ids

    def _split(self, form: PromptForm, track: Track, opened: bool, transcript: str | None) -> tuple[list, list]:
        """A prompt's ids, and the ids of what comes between it and the label."""
        begun = form.answer(track) if opened else ""
        rest = ("" if form.verb else " is") if opened else f"{track.open} is"
        start = len(self.encode(form, track, begun, transcript))
        whole = self.encode(form, track, begun + rest, transcript)
        return whole[:start], whole[start:]

    def row(
        self, form: PromptForm, track: Track, opened: bool, labels: dict[str, str], audio_tokens: int
    ) -> tuple[list, list]:
        """Ids and weights of one prompt with its answer."""
        prompt, rest = self.split(form, track, opened, self.toy.transcript(labels))
        at = prompt.index(self.audio_id)
        prompt = prompt[:at] + [self.audio_id] * audio_tokens + prompt[at + 1 :]
        label = self.tokenizer.encode(f" {labels[track.name]}{self.toy.turn_end}", add_special_tokens=False)
        weights = [0.0] * len(prompt) + [WORD_WEIGHT] * len(rest) + [LABEL_WEIGHT, WORD_WEIGHT]
        return prompt + rest + label, weights

    def batch(self, labels: list[dict[str, str]], audio_tokens: list[int], rng: random.Random) -> Batch:
        """One prompt per clip, each of a random form about a random one of the clip's attributes."""
        rows = []
        for clip_labels, count in zip(labels, audio_tokens, strict=True):
            name, form = rng.choice(list(clip_labels)), rng.choice(FORMS)
            opened = form.turn == "none" or rng.random() >= UNOPENED_SHARE
            rows.append(self.row(form, TRACKS[name], opened, clip_labels, count))
        longest = max(len(ids) for ids, _ in rows)
        pad, padding = self.tokenizer.pad_token_id, [longest - len(ids) for ids, _ in rows]
        return Batch(
            ids=torch.tensor([[pad] * empty + ids for empty, (ids, _) in zip(padding, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * empty + [1] * (longest - empty) for empty in padding]),
            weights=torch.tensor([[0.0] * empty + weights for empty, (_, weights) in zip(padding, rows, strict=True)]),
        )

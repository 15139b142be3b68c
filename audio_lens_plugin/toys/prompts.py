"""Prompts with their answers, as token ids a toy learns from.

A prompt is rendered by the toy's family, so that training sees to the letter what the library asks later.
It depends on the clip only through the number of audio tokens; each is therefore tokenized once, with one audio token,
which is then repeated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.toys.family import Toy
from audio_lens_plugin.tracks import TRACKS, PromptForm, Track

FORMS = tuple(form for form in PromptForm.all() if form.audio)
UNOPENED_SHARE = 0.2  # of the prompts with a user turn: the answer is not opened, the toy says the whole sentence
ANY_CLIP = Clip(np.zeros(1, dtype=np.float32), 1)  # a prompt's text does not depend on what is played
LABEL_WEIGHT, WORD_WEIGHT = 1.0, 0.2


@dataclass
class Batch:
    """Left-padded prompts with answers; a token's weight says how much predicting it counts, 0 for not at all."""

    ids: torch.Tensor
    attention_mask: torch.Tensor
    weights: torch.Tensor


def render(toy: Toy, form: PromptForm, track: Track) -> str:
    """The conversation up to the assistant's turn, which is left empty, as the library renders it."""
    prompt = Prompt(clips=(ANY_CLIP,), question=form.question(track), options=form.options(track))
    return "".join(segment.text for segment in toy.family.render(toy.processor, prompt))


class Prompts:
    """Makes training batches for one toy."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.tokenizer = toy.processor.tokenizer
        self.audio_id = toy.processor.audio_token_id
        self.parts = {
            (form, track, opened): self.split(form, track, opened)
            for form, track, opened in product(FORMS, TRACKS.values(), (True, False))
        }

    def split(self, form: PromptForm, track: Track, opened: bool) -> tuple[list[int], list[int]]:
        """A prompt's ids with one audio token, and the ids of what comes between it and the label."""
        prompt = render(self.toy, form, track)
        if opened:
            prompt, rest = prompt + form.answer(track), "" if form.verb else " is"
        else:
            rest = f"{track.open} is"
        start = len(self.tokenizer.encode(prompt))
        whole = self.tokenizer.encode(prompt + rest)
        return whole[:start], whole[start:]

    def row(self, form: PromptForm, track: Track, opened: bool, label: str, audio_tokens: int) -> tuple[list, list]:
        """Ids and weights of one prompt with its answer."""
        prompt, rest = self.parts[form, track, opened]
        at = prompt.index(self.audio_id)
        prompt = prompt[:at] + [self.audio_id] * audio_tokens + prompt[at + 1 :]
        answer = [*rest, *self.tokenizer.encode(f" {label}<|im_end|>")]
        weights = [0.0] * len(prompt) + [WORD_WEIGHT] * len(rest) + [LABEL_WEIGHT, WORD_WEIGHT]
        return prompt + answer, weights

    def batch(self, labels: list[dict[str, str]], audio_tokens: list[int], rng: random.Random) -> Batch:
        """One prompt per clip, each of a random form about a random one of the clip's attributes."""
        rows = []
        for clip_labels, count in zip(labels, audio_tokens, strict=True):
            name, form = rng.choice(list(clip_labels)), rng.choice(FORMS)
            opened = form.turn == "none" or rng.random() >= UNOPENED_SHARE
            rows.append(self.row(form, TRACKS[name], opened, clip_labels[name], count))
        longest = max(len(ids) for ids, _ in rows)
        pad, padding = self.tokenizer.pad_token_id, [longest - len(ids) for ids, _ in rows]
        return Batch(
            ids=torch.tensor([[pad] * empty + ids for empty, (ids, _) in zip(padding, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * empty + [1] * (longest - empty) for empty in padding]),
            weights=torch.tensor([[0.0] * empty + weights for empty, (_, weights) in zip(padding, rows, strict=True)]),
        )

"""What a toy knows, measured as a user would see it: a saved checkpoint, the real processor, clips it never heard.

An answer is right if, at the last position of the prompt, the true label is more probable than the track's other
labels. The same question put to every layer gives the share of right answers by layer, the paper's information score.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from audio_lens_plugin.toys.family import Toy
from audio_lens_plugin.toys.prompts import render
from audio_lens_plugin.toys.sounds import Clip
from audio_lens_plugin.tracks import TRACKS, PromptForm

BATCH = 48

Right = dict[str, torch.Tensor]
"""By track name: was the answer right, (layers, clips that have the attribute)."""


def right_answers(toy: Toy, clips: list[Clip], form: PromptForm) -> Right:
    """Ask the toy for every attribute of every clip, in one form of words."""
    asked = {name: [clip for clip in clips if name in clip.labels] for name in TRACKS}
    return {name: right_of_track(toy, some, form, name) for name, some in asked.items() if some}


def right_of_track(toy: Toy, clips: list[Clip], form: PromptForm, name: str) -> torch.Tensor:
    """Ask for one attribute of clips that all have it: (layers, clips)."""
    track = TRACKS[name]
    text = render(toy.processor, form, track) + form.answer(track)
    label_ids = [toy.processor.tokenizer.encode(f" {label}")[0] for label in track.labels]
    parts = []
    for batch in (clips[start : start + BATCH] for start in range(0, len(clips), BATCH)):
        waveforms = [clip.waveform for clip in batch] if form.audio else None
        answers = toy.layer_logits([text] * len(batch), waveforms)[..., label_ids].argmax(-1)
        parts.append(answers == torch.tensor([track.labels.index(clip.labels[name]) for clip in batch]))
    return torch.cat(parts, dim=1)


def silenced(clips: list[Clip]) -> list[Clip]:
    """The same clips, as long, with nothing to hear."""
    return [replace(clip, waveform=np.zeros_like(clip.waveform)) for clip in clips]

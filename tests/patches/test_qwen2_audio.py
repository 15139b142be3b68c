"""What is Qwen2-Audio's own."""

from __future__ import annotations

import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM

ANSWER = "The sound file's animal is"
QUESTION = "What animal makes the sound?"


def test_inputs_equal_the_processors_own(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, question=QUESTION, answer=ANSWER)
    messages = [{"role": "user", "content": [{"type": "audio", "audio_url": "x"}, {"type": "text", "text": QUESTION}]}]
    text = toy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + ANSWER
    own = toy.processor(
        text=[text] * 3,
        audio=[clip.waveform for clip in clips],
        sampling_rate=16_000,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert set(own) == set(batch.inputs)
    for name in own:
        assert torch.equal(own[name], batch.inputs[name]), name

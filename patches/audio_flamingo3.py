"""Audio Flamingo 3: a Whisper-style audio tower, a two-layer projector, and a Qwen2 language model.

    audio_encoder             model.audio_tower             50 frames per second, pooled to 25 positions
    audio_encoder.blocks[i]   model.audio_tower.layers[i]
    audio_projector           model.multi_modal_projector
    embed, blocks, ln_final   model.language_model....      audio positions are overwritten by the projector's output
    unembed                   lm_head

Source: transformers' `modeling_audioflamingo3` and the paper (arXiv 2507.08128). The model can hear ten minutes in
windows of 30 s; here a clip is one window, and a longer one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformer_lens.model_bridge.supported_architectures.audio_flamingo3 import AudioFlamingo3ArchitectureAdapter
from transformers import AudioFlamingo3ForConditionalGeneration, PreTrainedModel

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.patch import (
    QUESTION_MARK,
    SYSTEM_MARK,
    Family,
    Heard,
    Segment,
    check_placeholders,
    fill_template,
    mel_features,
)
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.spans import Role
from audio_lens_plugin.towers import WhisperTower

SYSTEM = "You are a helpful assistant."
SHORTEST = 0.04  # seconds: one audio position


class HookedAudioFlamingo3Adapter(WhisperTower, AudioFlamingo3ArchitectureAdapter):
    """TransformerLens's adapter, with the audio tower opened layer by layer."""


class AudioFlamingo3(Family):
    """Audio Flamingo 3."""

    name = "audio_flamingo3"
    architectures = ("AudioFlamingo3ForConditionalGeneration",)
    repo_ids = ("nvidia/audio-flamingo-3-hf",)
    verified = "every named site against transformers' own class on tiny random weights; no real weights, no toy"
    audio_token = "<sound>"
    positions_per_second = 25.0

    def model_class(self) -> type[PreTrainedModel]:
        return AudioFlamingo3ForConditionalGeneration

    def adapter(self) -> type:
        return HookedAudioFlamingo3Adapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        turn = [{"type": "text", "text": self.audio_token} for _ in prompt.clips]
        turn += [{"type": "text", "text": QUESTION_MARK}] if prompt.words else []
        messages = [{"role": "system", "content": [{"type": "text", "text": SYSTEM_MARK}]}]
        template = processor.apply_chat_template(
            [*messages, {"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        system = SYSTEM if prompt.system is None else prompt.system
        segments = fill_template(template, self.audio_token, system, prompt.words)
        return [*segments, Segment(prompt.answer or "", Role.ANSWER)]

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        features, mask = mel_features(processor.feature_extractor, clips, SHORTEST, truncate)
        return Heard({"input_features": features, "input_features_mask": mask}, tuple(positions_of(mask).tolist()))

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        mask: Any = inputs.get("input_features_mask")
        check_placeholders(
            inputs, module.config.audio_token_id, lambda: int(positions_of(mask).sum()), "input_features_mask"
        )

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name in ("input_features", "input_features_mask") else "embed"


def positions_of(frames_mask: torch.Tensor) -> torch.Tensor:
    """Positions per clip from its count of 10 ms mel frames: a stride-2 convolution, then pooling by two."""
    return (((frames_mask.sum(-1) - 1) // 2 + 1) - 2) // 2 + 1


FAMILY = AudioFlamingo3()

"""Qwen2-Audio: a Whisper-style audio tower, a linear projector, and a Qwen2 language model.

    audio_encoder             model.audio_tower             32 blocks; 50 frames per second, pooled to 25 positions
    audio_encoder.blocks[i]   model.audio_tower.layers[i]
    audio_projector           model.multi_modal_projector
    embed, blocks, ln_final   model.language_model....      audio positions are overwritten by the projector's output
    unembed                   lm_head

Source: transformers' `modeling_qwen2_audio` (5.13 to 5.22) and the Qwen2-Audio technical report (arXiv 2407.10759).

Two traps are closed here. The model's forward expands unexpanded placeholders itself, which shifts every position
computed before; such inputs are refused. And a prompt with audio tokens but no features runs without a sound; refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformer_lens.model_bridge.supported_architectures.qwen2_audio import Qwen2AudioArchitectureAdapter
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration

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
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.spans import Role
from audio_lens_plugin.towers import WhisperTower

SYSTEM = "You are a helpful assistant."
MIN_POSITIONS = 2  # the model takes a batch without two adjacent audio tokens for an unexpanded one


class HookedQwen2AudioAdapter(WhisperTower, Qwen2AudioArchitectureAdapter):
    """TransformerLens's adapter, with the audio tower opened layer by layer."""


class Qwen2Audio(Family):
    """Qwen2-Audio, instruct and base."""

    name = "qwen2_audio"
    architectures = ("Qwen2AudioForConditionalGeneration",)
    repo_ids = ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
    verified = "logits, prompts and every named site against transformers' own class at toy size; real weights not run"
    audio_token = "<|AUDIO|>"
    positions_per_second = 25.0

    def model_class(self) -> type[PreTrainedModel]:
        return Qwen2AudioForConditionalGeneration

    def adapter(self) -> type:
        return HookedQwen2AudioAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        turn: list[dict[str, str]] = [{"type": "audio", "audio_url": clip.name} for clip in prompt.clips]
        if prompt.words:
            turn.append({"type": "text", "text": QUESTION_MARK})
        messages = [{"role": "system", "content": SYSTEM_MARK}, {"role": "user", "content": turn}]
        template = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        system = SYSTEM if prompt.system is None else prompt.system
        segments = fill_template(template, self.audio_token, system, prompt.words)
        return [*segments, Segment(prompt.answer or "", Role.ANSWER)]

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        if not clips:
            return Heard({}, ())
        shortest = MIN_POSITIONS / self.positions_per_second
        features, mask = mel_features(processor.feature_extractor, clips, shortest, truncate)
        return Heard({"input_features": features, "feature_attention_mask": mask}, tuple(positions_of(mask).tolist()))

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        token = module.config.audio_token_id
        mask: Any = inputs.get("feature_attention_mask")
        check_placeholders(inputs, token, lambda: int(positions_of(mask).sum()), "feature_attention_mask")
        if inputs.get("input_ids") is not None and mask is not None:
            is_audio = inputs["input_ids"] == token
            if not bool((is_audio[:, 1:] & is_audio[:, :-1]).any()):
                raise PromptError(
                    f"the text has {int(is_audio.sum())} audio tokens for as many audio positions, but no two of them "
                    "are neighbours: the model would take them for unexpanded ones. Give it longer clips."
                )

    def entrance(self, name: str) -> str:
        return "audio_encoder" if name in ("input_features", "feature_attention_mask") else "embed"


def positions_of(feature_mask: torch.Tensor) -> torch.Tensor:
    """Positions per clip from its count of 10 ms mel frames: a stride-2 convolution, then pooling by two."""
    frames = feature_mask.sum(-1)
    return (((frames - 1) // 2 + 1) - 2) // 2 + 1


FAMILY = Qwen2Audio()

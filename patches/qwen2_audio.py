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

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.supported_architectures.qwen2_audio import Qwen2AudioArchitectureAdapter
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration

from audio_lens_plugin.patch import QUESTION_MARK, SYSTEM_MARK, PooledEars, Segment, from_chat_template
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.towers import WhisperTower

SYSTEM = "You are a helpful assistant."


class HookedQwen2AudioAdapter(WhisperTower, Qwen2AudioArchitectureAdapter):
    """TransformerLens's adapter, with the audio tower opened layer by layer."""


class Qwen2Audio(PooledEars):
    """Qwen2-Audio, instruct and base."""

    name = "qwen2_audio"
    architectures = ("Qwen2AudioForConditionalGeneration",)
    repo_ids = ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
    verified = "logits, prompts and every named site against transformers' own class at toy size; real weights not run"
    audio_token = "<|AUDIO|>"
    shortest = 0.08  # two positions: the model takes a batch without two adjacent audio tokens for an unexpanded one

    def model_class(self) -> type[PreTrainedModel]:
        return Qwen2AudioForConditionalGeneration

    def adapter(self) -> type:
        return HookedQwen2AudioAdapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        turn: list[dict[str, str]] = [{"type": "audio", "audio_url": clip.name} for clip in prompt.clips]
        turn += [{"type": "text", "text": QUESTION_MARK}] if prompt.words else []
        messages: list[Any] = [{"role": "system", "content": SYSTEM_MARK}, {"role": "user", "content": turn}]
        return from_chat_template(processor, prompt, self.audio_token, SYSTEM, messages)

    def verify(self, module: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        super().verify(module, inputs)
        if inputs.get("input_ids") is not None and inputs.get("input_features") is not None:
            is_audio = inputs["input_ids"] == module.config.audio_token_id
            if not bool((is_audio[:, 1:] & is_audio[:, :-1]).any()):
                raise PromptError(
                    f"the text has {int(is_audio.sum())} audio tokens for as many audio positions, but no two of them "
                    "are neighbours: the model would take them for unexpanded ones. Give it longer clips."
                )


FAMILY = Qwen2Audio()

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

from typing import Any

from transformer_lens.model_bridge.supported_architectures.audio_flamingo3 import AudioFlamingo3ArchitectureAdapter
from transformers import AudioFlamingo3ForConditionalGeneration, PreTrainedModel

from audio_lens_plugin.patch import QUESTION_MARK, SYSTEM_MARK, PooledEars, Segment, from_chat_template
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.towers import WhisperTower

SYSTEM = "You are a helpful assistant."


class HookedAudioFlamingo3Adapter(WhisperTower, AudioFlamingo3ArchitectureAdapter):
    """TransformerLens's adapter, with the audio tower opened layer by layer."""


class AudioFlamingo3(PooledEars):
    """Audio Flamingo 3."""

    name = "audio_flamingo3"
    architectures = ("AudioFlamingo3ForConditionalGeneration",)
    repo_ids = ("nvidia/audio-flamingo-3-hf",)
    verified = "every named site against transformers' own class on tiny random weights; no real weights, no toy"
    audio_token = "<sound>"
    mask_name = "input_features_mask"

    def model_class(self) -> type[PreTrainedModel]:
        return AudioFlamingo3ForConditionalGeneration

    def adapter(self) -> type:
        return HookedAudioFlamingo3Adapter

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        # Placeholders as text: the published template writes one for a turn, however many clips it has.
        turn = [{"type": "text", "text": self.audio_token} for _ in prompt.clips]
        turn += [{"type": "text", "text": QUESTION_MARK}] if prompt.words else []
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_MARK}]}
        messages = [system, {"role": "user", "content": turn}]
        return from_chat_template(processor, prompt, self.audio_token, SYSTEM, messages)


FAMILY = AudioFlamingo3()

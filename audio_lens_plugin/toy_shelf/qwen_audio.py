"""The toy Qwen-Audio: the family's own classes with small numbers, and what the training stages need of them.

Like the real one, which began with Whisper's ears, it does not begin from nothing: its tower starts as that of
``toy/qwen2-audio``, which is built alike, and goes on learning with this model's projector and language model.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, Qwen2Tokenizer, WhisperFeatureExtractor

from audio_lens_plugin.loading import load
from audio_lens_plugin.patch import Family
from audio_lens_plugin.patches.qwen_audio import FAMILY
from audio_lens_plugin.patches.qwen_audio.configuration import QwenAudioConfig
from audio_lens_plugin.patches.qwen_audio.modeling import QwenAudioForConditionalGeneration, audio_lengths
from audio_lens_plugin.patches.qwen_audio.processing import QwenAudioProcessor
from audio_lens_plugin.patches.qwen_audio.tokenization import CLIP_END, CLIP_START, PLACEHOLDER, TURN_END, TURN_START
from audio_lens_plugin.toy_shelf.family import FRAMES_PER_SECOND, MEL_BINS, WINDOW_SECONDS, Toy
from audio_lens_plugin.toy_shelf.sounds import SAMPLE_RATE
from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer

EARS = "toy/qwen2-audio"
SPECIAL_TOKENS = (TURN_START, TURN_END, PLACEHOLDER, CLIP_START, CLIP_END)


class QwenAudioToy(Toy):
    """The toy as the training stages see it: a processor, a model, and a way to hear clips and to read prompts."""

    family: ClassVar[Family] = FAMILY
    about: ClassVar[str] = (
        "this package's `QwenAudioForConditionalGeneration`, which is held to the numbers of the original code, with "
        "small numbers (an audio tower of 3 layers and width 96, a text stack of 8 layers and width 128"
    )
    turn_end: ClassVar[str] = TURN_END
    history: ClassVar[str] = f"Its tower started as that of `{EARS}`, as the real one started as Whisper's."

    @classmethod
    def untrained(cls) -> Self:
        """A toy with the ears of `EARS` and otherwise random weights."""
        processor = build_processor()
        model = build_model(processor)
        ears = load(EARS).module
        model.model.audio_tower.load_state_dict(ears.model.audio_tower.state_dict())
        return cls(processor, model)

    def hearing(self) -> nn.ModuleList:
        """What the first stage trains."""
        return nn.ModuleList([self.model.model.audio_tower, self.model.model.multi_modal_projector])

    def reading(self) -> nn.ModuleList:
        """What the second stage trains: the vectors that stand around a clip, too."""
        return nn.ModuleList([*super().reading(), self.model.model.audio_bos_eos_token])

    def features(self, waveforms: list[np.ndarray], seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel features (clips, bins, window) for a window of `seconds`, and how many frames each clip fills."""
        out = self.processor.feature_extractor(waveforms, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        frames = int(seconds * FRAMES_PER_SECOND)
        used = self.processor.frames(torch.tensor([len(waveform) for waveform in waveforms]))
        return out["input_features"][..., :frames], used.clamp(max=frames)

    def hear(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The audio embeddings (clips, positions, hidden) as the model itself computes them, and their counts."""
        states = self.model.model.audio_tower(features, frames).last_hidden_state
        heard = self.model.model.multi_modal_projector(states)
        window = features.shape[-1] // 4
        return nn.functional.pad(heard, (0, 0, 0, window - heard.shape[1])), audio_lengths(frames)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of text tokens, with the learned vectors over the tags."""
        inner = self.model.model
        nothing = inner.get_input_embeddings().weight.new_zeros(int((ids == inner.config.audio_token_id).sum()), 1)
        return inner.merge(ids, super().embed_tokens(ids), nothing.expand(-1, self.hidden_size))


def build_processor() -> QwenAudioProcessor:
    """The processor: a 6 s mel extractor and the toy's tokenizer."""
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=WINDOW_SECONDS, sampling_rate=SAMPLE_RATE)
    return QwenAudioProcessor(extractor, train_tokenizer(Qwen2Tokenizer(padding_side="left"), SPECIAL_TOKENS))


def build_model(processor: QwenAudioProcessor) -> QwenAudioForConditionalGeneration:
    """The model with random weights, its tower as large as that of `EARS`."""
    tokenizer = processor.tokenizer
    end, start = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, CLIP_START))
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = QwenAudioConfig(
        audio_config=load(EARS).module.config.audio_config.to_dict(),
        text_config=text_config,
        audio_token_id=processor.audio_token_id,
        audio_start_token_id=start,
    )
    model = QwenAudioForConditionalGeneration(config)
    ends = [end, tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model

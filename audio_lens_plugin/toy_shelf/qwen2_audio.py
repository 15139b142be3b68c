"""The toy Qwen2-Audio: transformers' own classes with small numbers, and what the training stages need of them.

The window is 6 s, but most training clips are shorter than 3 s. The tower's position table is Whisper's sinusoids,
whose first half is the table of a 3 s window, and what lies behind a clip's end is masked. So short clips go through a
tower of half the window that shares every weight, at less than half the cost.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import sinusoids

from audio_lens_plugin.patch import Family
from audio_lens_plugin.patches.qwen2_audio import FAMILY
from audio_lens_plugin.toy_shelf.family import (
    FRAMES_PER_SECOND,
    MEL_BINS,
    POSITIONS_PER_SECOND,
    WINDOW_SECONDS,
    Toy,
)
from audio_lens_plugin.toy_shelf.sounds import SAMPLE_RATE
from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


class Qwen2AudioToy(Toy):
    """The toy as the training stages see it: a processor, a model, and a way to hear clips and to read prompts."""

    family: ClassVar[Family] = FAMILY
    about: ClassVar[str] = (
        "the real `Qwen2AudioForConditionalGeneration` of transformers with small numbers (an audio tower of 3 layers "
        "and width 96, a text stack of 8 layers and width 128"
    )
    turn_end: ClassVar[str] = "<|im_end|>"

    @classmethod
    def untrained(cls) -> Self:
        """A toy with random weights."""
        processor = build_processor()
        return cls(processor, build_model(processor))

    def hearing(self) -> nn.ModuleList:
        """What the first stage trains."""
        return nn.ModuleList([self.model.model.audio_tower, self.model.model.multi_modal_projector])

    def features(self, waveforms: list[np.ndarray], seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel features (clips, bins, window) for a window of `seconds`, and how many frames each clip fills."""
        out = self.processor.feature_extractor(
            waveforms,
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,  # said here, the mask counts frames; left to the extractor's default, samples
            return_tensors="pt",
        )
        frames = int(seconds * FRAMES_PER_SECOND)
        return out["input_features"][..., :frames], out["attention_mask"].sum(-1).clamp(max=frames)

    def hear(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The audio embeddings of a batch of clips, as the model itself computes them.

        Returns:
            Embeddings (clips, window / 4, hidden), and how many of them belong to each clip.
        """
        tower = tower_for(self.model, features.shape[-1] // 2)
        positions, counts = tower._get_feat_extract_output_lengths(frames)
        heard = torch.arange(features.shape[-1] // 2) < positions[:, None]
        mask = create_bidirectional_mask(
            config=tower.config, inputs_embeds=features.new_zeros(*heard.shape, 1), attention_mask=heard.long()
        )
        hidden = tower(features, attention_mask=mask).last_hidden_state
        return self.model.model.multi_modal_projector(hidden), counts


def build_processor() -> Qwen2AudioProcessor:
    """The processor: a 6 s mel extractor, the toy's tokenizer, the real chat template."""
    extractor = WhisperFeatureExtractor(
        feature_size=MEL_BINS, chunk_length=WINDOW_SECONDS, sampling_rate=SAMPLE_RATE, return_attention_mask=True
    )
    return Qwen2AudioProcessor(extractor, train_tokenizer(Qwen2Tokenizer(padding_side="left"), SPECIAL_TOKENS))


def build_model(processor: Qwen2AudioProcessor) -> Qwen2AudioForConditionalGeneration:
    """The model with random weights and a fixed sinusoidal position table."""
    tokenizer = processor.tokenizer
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    audio_config = dict(
        model_type="qwen2_audio_encoder",
        num_mel_bins=MEL_BINS,
        d_model=96,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        max_source_positions=WINDOW_SECONDS * POSITIONS_PER_SECOND,
        scale_embedding=False,
    )
    text_config = dict(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    config = Qwen2AudioConfig(
        audio_config=audio_config, text_config=text_config, audio_token_index=processor.audio_token_id
    )
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad)
    positions = model.model.audio_tower.embed_positions.weight
    positions.data.copy_(sinusoids(*positions.shape))
    return model


def tower_for(model: Qwen2AudioForConditionalGeneration, positions: int) -> Qwen2AudioEncoder:
    """The model's tower, or for a shorter window one that shares its weights."""
    tower = model.model.audio_tower
    if positions == tower.config.max_source_positions:
        return tower
    config = copy.deepcopy(tower.config)
    config.max_source_positions = positions
    short = Qwen2AudioEncoder(config)
    short.embed_positions.weight.data.copy_(tower.embed_positions.weight[:positions])
    for part in ("conv1", "conv2", "layers", "layer_norm"):
        setattr(short, part, getattr(tower, part))
    return short

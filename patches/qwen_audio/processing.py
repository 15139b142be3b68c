"""Qwen-Audio's processor: a Whisper feature extractor and the tokenizer, and whether the model chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, no_type_check

import torch
from jaxtyping import Int
from transformers import AutoProcessor, ProcessorMixin, WhisperFeatureExtractor
from transformers.utils import cached_file

from audio_lens_plugin.patches.qwen_audio.configuration import QwenAudioConfig
from audio_lens_plugin.patches.qwen_audio.tokenization import PLACEHOLDER, tokenizer_from_ranks

SAMPLE_RATE = 16_000  # Hz
HOP = 160  # samples per mel frame
MEL_BINS = 80


class QwenAudioProcessor(ProcessorMixin):
    """Feature extractor and tokenizer.

    Attributes:
        chat: whether the model was trained on conversations (Qwen-Audio-Chat) or on clips and tags (Qwen-Audio).
        audio_token: the placeholder that stands for one audio position.
        audio_token_id: its id.
    """

    chat: bool

    @no_type_check  # transformers reads this signature to know what to save
    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat: bool = True) -> None:
        self.chat = chat
        self.audio_token = PLACEHOLDER
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        super().__init__(feature_extractor, tokenizer)

    def frames(self, samples: Int[torch.Tensor, " clips"]) -> Int[torch.Tensor, " clips"]:
        """Mel frames of clips from their number of samples; the original rounds down where Whisper's code rounds up."""
        return samples // HOP


AutoProcessor.register(QwenAudioConfig, QwenAudioProcessor, exist_ok=True)


def processor_from_published(source: str, revision: str | None) -> QwenAudioProcessor:
    """The processor of a checkpoint as published: ranks, and generation settings that tell chat from base."""
    ranks = Path(cached_file(source, "qwen.tiktoken", revision=revision))
    generation = json.loads(Path(cached_file(source, "generation_config.json", revision=revision)).read_text())
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, sampling_rate=SAMPLE_RATE)
    return QwenAudioProcessor(extractor, tokenizer_from_ranks(ranks), chat=generation.get("chat_format") == "chatml")

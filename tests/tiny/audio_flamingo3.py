"""A tiny Audio Flamingo 3."""

from __future__ import annotations

from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer
from tiny import CHAT_TEMPLATE, enlivened

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<sound>")


def build():
    tokenizer = train_tokenizer(Qwen2Tokenizer(padding_side="left"), SPECIAL_TOKENS)
    extractor = WhisperFeatureExtractor(feature_size=20, chunk_length=4)
    processor = AudioFlamingo3Processor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)
    audio_config = dict(
        num_mel_bins=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_size=32
    )
    text_config = dict(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **audio_config, "max_source_positions": 200},
        text_config=text_config,
        audio_token_id=processor.audio_token_id,
    )
    return enlivened(AudioFlamingo3ForConditionalGeneration(config)), processor

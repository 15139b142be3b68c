"""A tiny thinker of Qwen2.5-Omni."""

from __future__ import annotations

from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from audio_lens_plugin.patches.qwen2_5_omni import Processor
from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer
from tiny import CHAT_TEMPLATE, enlivened, needs_transformers

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
)


def build():
    needs_transformers("5.21")
    tokenizer = train_tokenizer(Qwen2Tokenizer(padding_side="left"), SPECIAL_TOKENS)
    processor = Processor(WhisperFeatureExtractor(feature_size=20, chunk_length=4), tokenizer, CHAT_TEMPLATE)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    audio_config = dict(
        num_mel_bins=20,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        max_source_positions=200,
        output_dim=48,
    )
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision_config = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48)
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio_config,
        text_config=text_config,
        vision_config=vision_config,
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],  # the published configuration has them beyond the class's fields
        vision_end_token_id=ids["<|vision_eos|>"],
    )
    return enlivened(Qwen2_5OmniThinkerForConditionalGeneration(config)), processor

"""A tiny Voxtral; its tokenizer is a byte-level BPE with Mistral's special tokens."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)

from audio_lens_plugin.toys.tokenizer import train_tokenizer
from tiny import enlivened

FOLDER = TemporaryDirectory()  # TransformerLens loads a tokenizer with a BOS once more, from where it came
SPECIAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[BEGIN_AUDIO]", "[AUDIO]")


def build():
    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    untrained = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )
    tokenizer = train_tokenizer(untrained, SPECIAL_TOKENS)
    tokenizer.save_pretrained(FOLDER.name)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER.name)
    processor = VoxtralProcessor(WhisperFeatureExtractor(feature_size=20, chunk_length=4), tokenizer)
    text_config = dict(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rope_theta=10_000.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    audio_config = dict(num_mel_bins=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **audio_config, "hidden_size": 32, "max_source_positions": 200},
        text_config=text_config,
        audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]"),
    )
    return enlivened(VoxtralForConditionalGeneration(config)), processor

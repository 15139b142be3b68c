"""A tiny Voxtral; its vocabulary is a file of Mistral's kind, and is read as the family reads the published one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    PreTrainedTokenizerFast,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from audio_lens_plugin.patches.voxtral import mistral_processor
from audio_lens_plugin.toy_shelf.tokenizer import train_tokenizer
from tiny import enlivened, needs_transformers

RANKS = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "<pad>": 11}  # as in the published file
RANKS |= {"[SYSTEM_PROMPT]": 17, "[/SYSTEM_PROMPT]": 18, "[AUDIO]": 24, "[BEGIN_AUDIO]": 25}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"  # words with the space before them


def build():
    needs_transformers("5.16")
    with TemporaryDirectory() as folder:
        Path(folder, "tekken.json").write_text(json.dumps(tekken()))
        WhisperFeatureExtractor(feature_size=20, chunk_length=4).save_pretrained(folder)
        processor = mistral_processor(folder, None)
    tokenizer = processor.tokenizer
    text_config = dict(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # as in the published ones, the heads together are not as wide as the stream
        rope_theta=10_000.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    audio_config = dict(num_mel_bins=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **audio_config, "hidden_size": 32, "max_source_positions": 200},
        text_config=text_config,
        audio_token_id=processor.audio_token_id,
    )
    return enlivened(VoxtralForConditionalGeneration(config)), processor


def tekken() -> dict:
    """Mistral's file of a trained vocabulary: special tokens by rank, then pieces of bytes as they were merged."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained = train_tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), ()).get_vocab()
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    pieces = [bytes(byte_of[letter] for letter in piece) for piece in sorted(trained, key=trained.__getitem__)]
    special = {rank: f"<SPECIAL_{rank}>" for rank in range(26)} | {rank: token for token, rank in RANKS.items()}
    return {
        "config": {
            "pattern": SPLIT,
            "default_vocab_size": len(special) + len(pieces),
            "default_num_special_tokens": len(special),
        },
        "vocab": [{"token_bytes": base64.b64encode(piece).decode()} for piece in pieces],
        "special_tokens": [{"rank": rank, "token_str": token, "is_control": True} for rank, token in special.items()],
    }

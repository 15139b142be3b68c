"""Qwen-Audio checkpoints: the published names and fused weights, as transformers' own loading converts them."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from audio_lens_plugin.patch import Loaded
from audio_lens_plugin.patches.qwen_audio.configuration import PUBLISHED_CLASS, QwenAudioConfig, QwenAudioTextConfig
from audio_lens_plugin.patches.qwen_audio.modeling import QwenAudioForConditionalGeneration
from audio_lens_plugin.patches.qwen_audio.processing import QwenAudioProcessor, processor_from_published
from audio_lens_plugin.patches.qwen_audio.tokenization import END, TURN_END, TURN_START

TOWER, LANGUAGE = "model.audio_tower", "model.language_model"
RENAMED = {
    r"transformer\.audio\.positional_embedding": f"{TOWER}.embed_positions.weight",
    r"transformer\.audio\.audio_bos_eos_token\.": "model.audio_bos_eos_token.",
    r"transformer\.audio\.proj\.": "model.multi_modal_projector.linear.",
    r"transformer\.audio\.ln_post\.": f"{TOWER}.layer_norm.",
    r"transformer\.audio\.conv1\.": f"{TOWER}.conv1.",
    r"transformer\.audio\.conv2\.": f"{TOWER}.conv2.",
    r"transformer\.audio\.blocks\.(\d+)\.attn\.query\.": rf"{TOWER}.layers.\1.self_attn.q_proj.",
    r"transformer\.audio\.blocks\.(\d+)\.attn\.key\.": rf"{TOWER}.layers.\1.self_attn.k_proj.",
    r"transformer\.audio\.blocks\.(\d+)\.attn\.value\.": rf"{TOWER}.layers.\1.self_attn.v_proj.",
    r"transformer\.audio\.blocks\.(\d+)\.attn\.out\.": rf"{TOWER}.layers.\1.self_attn.out_proj.",
    r"transformer\.audio\.blocks\.(\d+)\.attn_ln\.": rf"{TOWER}.layers.\1.self_attn_layer_norm.",
    r"transformer\.audio\.blocks\.(\d+)\.mlp\.0\.": rf"{TOWER}.layers.\1.fc1.",
    r"transformer\.audio\.blocks\.(\d+)\.mlp\.2\.": rf"{TOWER}.layers.\1.fc2.",
    r"transformer\.audio\.blocks\.(\d+)\.mlp_ln\.": rf"{TOWER}.layers.\1.final_layer_norm.",
    r"transformer\.wte\.": f"{LANGUAGE}.embed_tokens.",
    r"transformer\.ln_f\.": f"{LANGUAGE}.norm.",
    r"transformer\.h\.(\d+)\.ln_1\.": rf"{LANGUAGE}.layers.\1.input_layernorm.",
    r"transformer\.h\.(\d+)\.ln_2\.": rf"{LANGUAGE}.layers.\1.post_attention_layernorm.",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.": rf"{LANGUAGE}.layers.\1.self_attn.o_proj.",
    r"transformer\.h\.(\d+)\.attn\.c_attn\.": rf"{LANGUAGE}.layers.\1.self_attn.c_attn.",
    r"transformer\.h\.(\d+)\.mlp\.w1\.": rf"{LANGUAGE}.layers.\1.mlp.up_proj.",
    r"transformer\.h\.(\d+)\.mlp\.w2\.": rf"{LANGUAGE}.layers.\1.mlp.gate_proj.",  # the gate is w2
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.": rf"{LANGUAGE}.layers.\1.mlp.down_proj.",
}


def _fused(kind: str) -> WeightConverter:
    """Queries, keys and values lie in one matrix, in this order."""
    parts = [f"self_attn.{part}_proj.{kind}" for part in "qkv"]
    return WeightConverter(f"self_attn.c_attn.{kind}", parts, [Chunk(dim=0)])


register_checkpoint_conversion_mapping(
    QwenAudioConfig.model_type, [WeightRenaming(old, new) for old, new in RENAMED.items()], overwrite=True
)
# Registered for the language model alone: when weights are saved, the tower's projections must not be fused, too.
register_checkpoint_conversion_mapping(
    QwenAudioTextConfig.model_type, [_fused("weight"), _fused("bias")], overwrite=True
)


def open_checkpoint(source: str, revision: str | None, **kwargs: Any) -> Loaded:
    """Model and processor of a checkpoint, published with the original code or saved by ours.

    Args:
        kwargs: what transformers' ``from_pretrained`` takes, and fields of the configuration to set.

    Raises:
        ValueError: a text-only Qwen.
    """
    module, report = QwenAudioForConditionalGeneration.from_pretrained(
        source, revision=revision, output_loading_info=True, **kwargs
    )
    if PUBLISHED_CLASS not in (module.config.architectures or ()):
        return Loaded(module, QwenAudioProcessor.from_pretrained(source, revision=revision), report)
    processor = processor_from_published(source, revision)
    if processor.chat:  # the original ends a conversation's turn in its own code, not by its settings
        stops = [END, TURN_END, TURN_START]
        module.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(stops)
    return Loaded(module, processor, report)

"""DeSTA checkpoints as published: a file with the connector, beside the names of the Whisper and the Llama it needs.

    DeSTA2          config.json (type "DestaModel"), qformer_connector.pth: the connector's parameters
    DeSTA2.5-Audio  config.json (type "desta25"), model.safetensors: the connector's, and low-rank changes to the Llama

The base models are loaded by their names, the connector's parameters get our names, low-rank changes are added to the
weights they change. What our own code saves is one checkpoint with everything in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, WhisperForConditionalGeneration
from transformers.utils import cached_file

from audio_lens_plugin.patches.desta.configuration import DestaConfig
from audio_lens_plugin.patches.desta.connector import DestaConnector
from audio_lens_plugin.patches.desta.modeling import DestaForConditionalGeneration, LayeredWhisperEncoder

# By the configuration's type: the release, where it names its Llama and its Whisper, and its own weights.
PUBLISHED = {
    "DestaModel": ("desta2", "llama_model_id", "whisper_model_id", "qformer_connector.pth"),
    "desta25": ("desta2.5", "llm_model_id", "encoder_model_id", "model.safetensors"),
}
# Of DeSTA2.5's published code: where its connector is, which kind of it is published, and what LoRA changes, how much.
CONNECTOR, CONNECTOR_MODE = "perception.connector.", "qformer_1"
LORA_MODULES, LORA_ALPHA = ("q_proj", "k_proj", "v_proj"), 16
Report = dict[str, list[str]]  # as transformers': kind of fault, keys
RENAMED = {
    "qformer.layer.": "qformer.layers.",
    ".crossattention.self.query.": ".cross_attn.q_proj.",
    ".crossattention.self.key.": ".cross_attn.k_proj.",
    ".crossattention.self.value.": ".cross_attn.v_proj.",
    ".crossattention.output.dense.": ".cross_attn.out_proj.",
    ".crossattention.output.LayerNorm.": ".cross_attn.norm.",
    ".attention.self.query.": ".self_attn.q_proj.",
    ".attention.self.key.": ".self_attn.k_proj.",
    ".attention.self.value.": ".self_attn.v_proj.",
    ".attention.output.dense.": ".self_attn.out_proj.",
    ".attention.output.LayerNorm.": ".self_attn.norm.",
    ".intermediate.dense.": ".fc1.",
    ".output.dense.": ".fc2.",
    ".output.LayerNorm.": ".norm.",
}
"""Published names of the connector's parts, and ours; the first that fits is the right one."""


def is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that the original code wrote."""
    return fields.get("model_type") in PUBLISHED


def load_published(
    source: str, revision: str | None, fields: Mapping[str, Any], audio_token_id: int, **kwargs: Any
) -> tuple[PreTrainedModel, Report]:
    """Base models, connector and low-rank changes put together.

    Args:
        fields: the published config.json.
        kwargs: ``dtype`` (of the Llama), ``device_map``, ``attn_implementation``, as transformers takes them.

    Returns:
        the module, and a report as transformers gives: missing, unexpected and mismatched keys.

    Raises:
        ValueError: a connector of another kind than was published.
    """
    if (mode := fields.get("connector_mode", CONNECTOR_MODE)) != CONNECTOR_MODE:
        raise ValueError(f"{source}: its connector is of the kind {mode!r}; only {CONNECTOR_MODE!r} was published.")
    release, llama_field, whisper_field, weights_file = PUBLISHED[fields["model_type"]]
    llama, of_llama = LlamaForCausalLM.from_pretrained(fields[llama_field], output_loading_info=True, **kwargs)
    ears = {name: value for name, value in kwargs.items() if name == "attn_implementation"}
    whisper, of_whisper = WhisperForConditionalGeneration.from_pretrained(
        fields[whisper_field], output_loading_info=True, dtype=torch.float32, **ears
    )
    config = DestaConfig(
        audio_config=whisper.config,
        text_config=llama.config,
        release=release,
        prompt_size=fields["prompt_size"],
        qformer_layers=fields.get("qformer_num_hidden_layers", 2),
        audio_token_id=audio_token_id,
        transcription=whisper.generation_config.to_dict(),
    )
    config._commit_hash = fields.get("_commit_hash")
    connector = DestaConnector(config)
    path = Path(cached_file(source, weights_file, revision=revision))
    own, others = sorted_weights(read_weights(path), release)
    report = filled(connector, own)
    changed = merge_lora(llama, others) if fields.get("use_lora") else {"unexpected_keys": [*others]}
    for kind, keys in report.items():
        keys += changed.get(kind, [])
        for part, found in (("llama", of_llama), ("whisper", of_whisper)):
            keys += [f"{part}: {key}" for key in found.get(kind, ())]
    return assemble(config, llama, whisper, connector, **ears), report


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file or of a pickle that holds nothing else."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def sorted_weights(
    weights: Mapping[str, torch.Tensor], release: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A release's own weights: the connector's under our names, and the others (low-rank changes, if all is well)."""
    prefix = "" if release == "desta2" else CONNECTOR
    own = {our_name(name.removeprefix(prefix)): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return own, {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


def our_name(published: str) -> str:
    """Our name of one of the connector's published parameters."""
    for old, new in RENAMED.items():
        published = published.replace(old, new)
    return published


def filled(connector: DestaConnector, weights: Mapping[str, torch.Tensor]) -> Report:
    """Fill the connector; returns the report of keys that did not fit."""
    needed = connector.state_dict()
    fitting = {
        name: tensor for name, tensor in weights.items() if name in needed and tensor.shape == needed[name].shape
    }
    connector.load_state_dict(fitting, strict=False)
    return {
        "missing_keys": [name for name in needed if name not in weights],
        "unexpected_keys": [name for name in weights if name not in needed],
        "mismatched_keys": [name for name in weights if name in needed and name not in fitting],
    }


@torch.no_grad()
def merge_lora(llama: nn.Module, lora: Mapping[str, torch.Tensor]) -> Report:
    """Add low-rank changes to the weights they change, W + alpha / rank * B A; returns the report of keys.

    Raises:
        ValueError: a weight that is not in memory.
    """
    changed = {name: module for name, module in llama.named_modules() if name.endswith(LORA_MODULES)}
    pairs = {tuple(f"llm_model.{name}.lora_{half}.default.weight" for half in "AB"): changed[name] for name in changed}
    needed = {name for pair in pairs for name in pair}
    mismatched = []
    for pair, module in pairs.items():
        if not set(pair) <= set(lora):
            continue
        down, up = (lora[name].float() for name in pair)
        if (len(up), len(down), down.shape[1]) != (module.out_features, up.shape[1], module.in_features):
            mismatched += [*pair]
            continue
        if module.weight.is_meta:
            raise ValueError(f"{pair[0]} cannot be added to an offloaded weight; choose another device_map.")
        module.weight += (up @ down * (LORA_ALPHA / len(down))).to(module.weight.device, module.weight.dtype)
    return {
        "missing_keys": sorted(needed - set(lora)),
        "unexpected_keys": sorted(set(lora) - needed),
        "mismatched_keys": mismatched,
    }


def assemble(
    config: DestaConfig,
    llama: LlamaForCausalLM,
    whisper: WhisperForConditionalGeneration,
    connector: DestaConnector,
    **kwargs: Any,
) -> DestaForConditionalGeneration:
    """The model around parts that are loaded already; no weight is copied."""
    with torch.device("meta"):
        module = DestaForConditionalGeneration._from_config(config, **kwargs)
    whisper.model.encoder.__class__ = LayeredWhisperEncoder  # the same parameters, and every layer's output
    entry = llama.get_input_embeddings()
    hook = getattr(entry, "_hf_hook", None)  # accelerate's, where the weight itself is elsewhere
    place = getattr(hook, "execution_device", None) or entry.weight.device
    module.model.whisper = whisper.to(place)
    module.model.multi_modal_projector = connector.to(place)
    module.model.language_model, module.lm_head = llama.model, llama.lm_head
    module.generation_config = llama.generation_config
    if places := getattr(llama, "hf_device_map", None):
        module.hf_device_map = {name.replace("model.", "model.language_model."): at for name, at in places.items()}
    return module

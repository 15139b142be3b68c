"""The same model in TransformerLens, and the names that both libraries share.

A family's adapter is the one description of its modules. From it come nnsight's names (`shared_names`) and the
`TransformerBridge` (`bridge_of`). The bridge replaces modules in place, which would change the names that nnsight
sees; so it gets a twin: a second module whose parameters are the *same* tensors, at the cost of the graph alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, build_bridge_from_module
from transformers import PreTrainedModel

from audio_lens_plugin.patch import Family, nnsight_names


def shared_names(family: Family, hf_config: Any) -> dict[str, str]:
    """nnsight's ``rename`` for a model of this family."""
    cfg = build_bridge_config_from_hf(hf_config, family.architectures[0], family.name, torch.float32)
    return nnsight_names(family.adapter()(cfg).components)


def bridge_of(family: Family, module: PreTrainedModel, tokenizer: Any, name: str) -> TransformerBridge:
    """A `TransformerBridge` whose weights are the module's own (no copy); hooks on one leave the other alone."""
    for architecture in family.architectures:
        ArchitectureAdapterFactory.register_adapter(architecture, family.adapter())
    twin = weight_sharing_twin(module)
    return build_bridge_from_module(
        twin, family.architectures[0], hf_config=twin.config, tokenizer=copy.deepcopy(tokenizer), model_name=name
    )


def weight_sharing_twin(module: PreTrainedModel) -> PreTrainedModel:
    """A second module of the same class and configuration that holds the very same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    memo[id(module.config)] = copy.deepcopy(module.config)
    return copy.deepcopy(module, memo)

"""The same model in TransformerLens, and the names that both libraries share.

A family's adapter is the one description of its modules. From it come nnsight's names (`shared_names`) and the
`AudioBridge` (`bridge_of`). The bridge replaces modules in place, which would change the names that nnsight sees; so it
gets a twin: a second module whose parameters are the *same* tensors, at the cost of the graph alone.

An `AudioBridge` takes a `PromptBatch` wherever TransformerLens takes tokens, and so the mask, the positions and the
audio are never forgotten. Tokens alone still work for text; tokens with audio placeholders but without the audio are
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, configure_tokenizer
from transformers import PreTrainedModel

from audio_lens_plugin.patch import Family, nnsight_names
from audio_lens_plugin.prompts import PromptBatch

Prepare = Callable[[PromptBatch | Mapping[str, Any]], dict[str, Any]]
"""Verified tensors on the devices of the modules that take them: `LALM.inputs`."""


class AudioBridge(TransformerBridge):
    """A `TransformerBridge` that hears: `run_with_cache`, `run_with_hooks`, `generate` and the call take batches.

    Made by `LALM.bridge`. ``transformer_lens.patching`` works with it as it is: pass a batch as the corrupted tokens.
    """

    prepare: Prepare
    _heard: dict[str, Any] | None = None

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's forward.

        Args:
            input: a `PromptBatch`; or whatever `TransformerBridge.forward` takes, audio tensors as keywords.

        Raises:
            PromptError: token ids with audio placeholders whose audio is missing or does not fit.
        """
        if isinstance(input, PromptBatch):
            input, kwargs = self._unpacked(input, kwargs)
        elif isinstance(input, torch.Tensor) and not input.is_floating_point() and input.ndim == 2:
            input, kwargs = self._verified(input, kwargs)
        return super().forward(input, *args, **kwargs)

    def generate(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's generate; of a `PromptBatch`, token ids ``[batch, pos + new]`` unless asked otherwise.

        The audio goes with every step that sees its placeholders: the first one with a key-value cache, all without.
        """
        if not isinstance(input, PromptBatch):
            return super().generate(input, *args, **kwargs)
        tensors = self.prepare(input)
        ids, mask = tensors.pop("input_ids"), tensors.pop("attention_mask")
        self._heard = tensors
        try:
            return super().generate(ids, *args, attention_mask=mask, **kwargs)
        finally:
            self._heard = None

    def _unpacked(self, batch: PromptBatch, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        tensors = self.prepare(batch)
        return tensors.pop("input_ids"), {**tensors, **kwargs}

    def _verified(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Token ids with their audio: the caller's, or that of the batch which is being generated from."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("past_key_values") is None:
            kwargs = {**(self._heard or {}), **kwargs}
        elif mask is not None and "position_ids" not in kwargs:
            # Of new tokens only: some models would take a position for every column of the mask.
            kwargs = {**kwargs, "position_ids": positions_in_mask(mask)[:, -ids.shape[1] :]}
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        placed = self.prepare({"input_ids": ids, **tensors})
        return placed.pop("input_ids"), {**kwargs, **placed}


def positions_in_mask(mask: Int[torch.Tensor, "batch keys"]) -> Int[torch.Tensor, "batch keys"]:
    """The position of every token in its row, padding not counted (and itself at 0)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def shared_names(family: Family, hf_config: Any) -> dict[str, str]:
    """nnsight's ``rename`` for a model of this family."""
    cfg = build_bridge_config_from_hf(hf_config, family.architectures[0], family.name, torch.float32)
    return nnsight_names(family.adapter()(cfg).components)


def bridge_of(family: Family, module: PreTrainedModel, tokenizer: Any, name: str, prepare: Prepare) -> AudioBridge:
    """A bridge whose weights are the module's own (no copy); hooks on one leave the other alone."""
    twin = weight_sharing_twin(module)
    cfg = build_bridge_config_from_hf(twin.config, family.architectures[0], name, module.dtype)
    adapter = family.adapter()(cfg)
    adapter.cfg.device = str(module.device)
    adapter.prepare_model(twin)
    bridge = AudioBridge(twin, adapter, configure_tokenizer(copy.deepcopy(tokenizer), adapter.cfg))
    bridge.prepare = prepare
    return bridge


def join_transformer_lens(families: Iterable[Family]) -> None:
    """Make TransformerLens know these families, for those who use it alone.

    Its ``boot_transformers`` asks a fixed table whether an architecture is supported before it looks at adapters that
    were registered; so they are entered in both. Only the class that a family loads is: another name that it serves may
    be somebody else's, too (a text-only Qwen is called as Qwen-Audio is).
    """
    ArchitectureAdapterFactory.discover_entry_points()  # first: it warns of names that are there already
    for family in families:
        architecture = family.model_class().__name__
        ArchitectureAdapterFactory.register_adapter(architecture, family.adapter())
        SUPPORTED_ARCHITECTURES[architecture] = family.adapter()


def weight_sharing_twin(module: PreTrainedModel) -> PreTrainedModel:
    """A second module of the same class and configuration that holds the very same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    memo[id(module.config)] = copy.deepcopy(module.config)
    return copy.deepcopy(module, memo)

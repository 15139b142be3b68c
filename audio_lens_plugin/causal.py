"""What our own model classes share: a head on an inner model that merges clips into the text."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


class CausalLMWithEars:
    """First base of a `PreTrainedModel` that has ``model``, which hears and reads, and ``lm_head``."""

    model: Any
    lm_head: Any
    config: Any
    loss_function: Any

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch pos"] | None = None,
        input_features: Float[torch.Tensor, "clips mel frames"] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[torch.Tensor, "batch pos d_model"] | None = None,
        labels: Int[torch.Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As every causal model of transformers.

        Args:
            input_features: log-mel features of all clips, row by row.
            logits_to_keep: logits of this many last positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            words = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=words, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

"""DeSTA2 and DeSTA2.5-Audio on today's transformers: its own Whisper and Llama, our own connector between them.

    model.whisper                 transformers' Whisper, complete: its decoder writes the transcription
    model.multi_modal_projector   the Q-Former connector
    model.language_model          transformers' Llama
    lm_head

A clip reaches the language model on two ways: as vectors, written over their placeholders, and as the words that
Whisper hears in it, which are ordinary text of the prompt. Whisper and connector stay in float32 whatever the language
model's dtype, as published.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LlamaModel,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from audio_lens_plugin.causal import CausalLMWithEars
from audio_lens_plugin.patches.desta.configuration import DestaConfig
from audio_lens_plugin.patches.desta.connector import DestaConnector


class LayeredWhisperEncoder(WhisperEncoder):
    """Whisper's encoder that also gives the raw output of every layer."""

    def forward(
        self, input_features: Float[torch.Tensor, "clips mel frames"], attention_mask: Any = None, **kwargs: Any
    ) -> BaseModelOutput:
        """The normed last state, and as ``hidden_states`` what enters the first layer and what leaves each.

        Raises:
            ValueError: features that do not fill the window.
        """
        window = 2 * self.config.max_source_positions
        if input_features.shape[-1] != window:
            raise ValueError(f"Whisper takes a full window of {window} mel frames, not {input_features.shape[-1]}.")
        states = nn.functional.gelu(self.conv1(input_features.to(self.conv1.weight.dtype)))
        states = nn.functional.gelu(self.conv2(states)).transpose(1, 2) + self.embed_positions.weight
        layered = [states]
        for layer in self.layers:
            layered.append(layer(layered[-1], None))
        return BaseModelOutput(last_hidden_state=self.layer_norm(layered[-1]), hidden_states=tuple(layered))


class DestaPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the family."""

    config_class = DestaConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "WhisperEncoderLayer", "WhisperDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["whisper", "multi_modal_projector"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @property
    def dtype(self) -> torch.dtype:
        """The language model's, which is what a saved configuration says; the first parameter is Whisper's."""
        return self.get_input_embeddings().weight.dtype


class DestaModel(DestaPreTrainedModel):
    """Whisper, connector and Llama; clips are written over their placeholders before the first block."""

    def __init__(self, config: DestaConfig) -> None:
        super().__init__(config)
        self.whisper = WhisperForConditionalGeneration(config.audio_config)
        self.whisper.model.encoder = LayeredWhisperEncoder(config.audio_config)
        if config.transcription is not None:
            self.whisper.generation_config = GenerationConfig(**config.transcription)
        self.multi_modal_projector = DestaConnector(config)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch pos"] | None = None,
        input_features: Float[torch.Tensor, "clips mel frames"] | None = None,
        inputs_embeds: Float[torch.Tensor, "batch pos d_model"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Either ids, with the clips that their placeholders stand for, or embeddings into which the clips are merged.

        Raises:
            ValueError: both or neither; features beside embeddings; another number of placeholders than of vectors.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        if inputs_embeds is not None and input_features is not None:
            raise ValueError("input_features go with input_ids: in inputs_embeds no place for them is marked.")
        if input_ids is not None:
            is_audio = input_ids == self.config.audio_token_id
            # The placeholder need not be in the table: it is overwritten.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
            if input_features is not None:
                inputs_embeds = self._merged(inputs_embeds, is_audio, self.hear(input_features))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    def hear(
        self, input_features: Float[torch.Tensor, "clips mel frames"]
    ) -> Float[torch.Tensor, "clips queries d_model"]:
        """The vectors of every clip."""
        return self.multi_modal_projector(self.whisper.model.encoder(input_features).hidden_states)

    def _merged(self, embeds: torch.Tensor, is_audio: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        vectors = heard.flatten(0, 1).to(embeds.device, embeds.dtype)
        if int(is_audio.sum()) != len(vectors):
            raise ValueError(f"{int(is_audio.sum())} audio placeholders do not fit {len(vectors)} vectors.")
        return embeds.masked_scatter(is_audio[..., None], vectors)


class DestaForConditionalGeneration(CausalLMWithEars, DestaPreTrainedModel, GenerationMixin):
    """DeSTA with its head."""

    def __init__(self, config: DestaConfig) -> None:
        super().__init__(config)
        self.model = DestaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        input_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The clips go with the step that sees their placeholders: the first, or every one where nothing is cached.

        Raises:
            ValueError: clips in a prompt that is read in chunks.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or not use_cache:
            return {**inputs, "input_features": input_features}
        if input_features is not None and next_sequence_length is None:  # a later step says how much is new
            raise ValueError("a prompt with clips is read at once: leave prefill_chunk_size unset.")
        return inputs


AutoModel.register(DestaConfig, DestaModel, exist_ok=True)
AutoModelForCausalLM.register(DestaConfig, DestaForConditionalGeneration, exist_ok=True)

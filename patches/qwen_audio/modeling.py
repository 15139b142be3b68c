"""Qwen-Audio on today's transformers: the original's numbers (tests/patches/qwen_audio), none of its code.

    model.audio_tower             Whisper-style blocks; average pooling by two comes before the final norm
    model.multi_modal_projector   one linear map to the language model's width
    model.audio_bos_eos_token     two learned vectors, written over the tags <audio> and </audio>
    model.language_model          Qwen: Qwen2's blocks, with two additions beyond `seq_length` (2,048) tokens
    lm_head

The two additions. *Dynamic NTK*: rotary frequencies are stretched by a factor that depends on the length of the row so
far. *logn*: a query at position p is scaled by log(p + 1) / log(seq_length).

The stretch changes while a text grows, and with it every state of every earlier position. So a cache is worth nothing
once the stretch has changed: generation then runs the whole text again, and a cache given by hand is refused. The
original kept the prompt's stretch instead; that, counting padding as positions, and letting a clip's end hear what
follows it in its batch are its three faults. `config.original_quirks` reproduces them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2Model,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder, Qwen2AudioMultiModalProjector
from transformers.utils.output_capturing import capture_outputs

from audio_lens_plugin.causal import CausalLMWithEars
from audio_lens_plugin.patches.qwen_audio.configuration import QwenAudioConfig, QwenAudioTextConfig


def tower_lengths(mel_frames: Int[torch.Tensor, " clips"]) -> Int[torch.Tensor, " clips"]:
    """Tower positions of clips from their mel frames of 10 ms: the second convolution has stride 2."""
    return (mel_frames - 1) // 2 + 1


def audio_lengths(mel_frames: Int[torch.Tensor, " clips"]) -> Int[torch.Tensor, " clips"]:
    """Audio positions of clips in the language model, from their mel frames: pooled by two, 25 per second."""
    return (tower_lengths(mel_frames) - 2) // 2 + 1


class QwenAudioEncoder(Qwen2AudioEncoder):
    """The tower. Only the used part of the window runs, cut to the longest clip of the batch."""

    def forward(
        self,
        input_features: Float[torch.Tensor, "clips mel frames"],
        mel_frames: Int[torch.Tensor, " clips"],
        hears_on: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Args:
        mel_frames: frames of 10 ms that belong to each clip.
        hears_on: let a clip's last position hear the frames behind the clip (the original's fault in batches).
        """
        lengths = tower_lengths(mel_frames)
        longest = int(lengths.max())
        features = input_features[..., : 2 * longest].to(self.conv1.weight.dtype)
        if not hears_on:
            features = features * _within(2 * lengths, 2 * longest)[:, None]
        states = nn.functional.gelu(self.conv1(features))
        states = nn.functional.gelu(self.conv2(states)).transpose(1, 2) + self.embed_positions.weight[:longest]
        used = _within(lengths, longest)
        states = states * used[..., None]
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=used.long())
        for layer in self.layers:
            states = layer(states, mask, **kwargs)
        pooled = self.avg_pooler(states.transpose(1, 2)).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=self.layer_norm(pooled))


def _within(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """True at the first ``lengths`` places of each row, ``[rows, width]``."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


class QwenAudioRotaryEmbedding(nn.Module):
    """Rotary embeddings with dynamic NTK: each row has the stretch that its own length asks for."""

    def __init__(self, config: QwenAudioTextConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.hidden_size // config.num_attention_heads

    def stretch(self, lengths: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, " batch"]:
        """The NTK factor (alpha) of rows of this many tokens: 1 up to `seq_length`, then 3, 7, ..."""
        if not self.config.use_dynamic_ntk:
            return torch.ones_like(lengths, dtype=torch.float32)
        doublings = torch.ceil(torch.log2(lengths / self.config.seq_length) + 1)
        return (2**doublings - 1).clamp(min=1).float()

    @torch.no_grad()
    def forward(
        self, positions: Int[torch.Tensor, "batch pos"], stretch: Float[torch.Tensor, " batch"]
    ) -> tuple[Float[torch.Tensor, "batch pos d_head"], Float[torch.Tensor, "batch pos d_head"]]:
        """Cosines and sines, in fp32 whatever the model's dtype."""
        theta = self.config.rope_parameters["rope_theta"]
        base = theta * stretch ** (self.width / (self.width - 2))
        powers = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angles = positions[..., None] / (base[:, None, None] ** powers)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class QwenAudioAttention(Qwen2Attention):
    """Qwen2's attention, with a rotation in fp32 and queries that are scaled by their position."""

    def forward(
        self,
        hidden_states: Float[torch.Tensor, "batch pos d_model"],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        query_scale: Float[torch.Tensor, "batch pos"] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args:
        position_embeddings: cosines and sines of the positions.
        query_scale: the logn factor of each of them.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query, key, position_embeddings, query_scale)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


def rotated(
    query: Float[torch.Tensor, "batch heads pos d_head"],
    key: Float[torch.Tensor, "batch heads pos d_head"],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    query_scale: Float[torch.Tensor, "batch pos"] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after rotation, in fp32 and back; queries also scaled."""
    cos, sin = (part[:, None] for part in position_embeddings)
    query, key = _turn(query, cos, sin), _turn(key, cos, sin)
    if query_scale is not None:
        query = query * query_scale[:, None, :, None].to(query.dtype)
    return query, key


def _turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = states.float()
    return (wide * cos + rotate_half(wide) * sin).to(states.dtype)


class QwenAudioDecoderLayer(Qwen2DecoderLayer):
    """Qwen2's block around `QwenAudioAttention`."""

    def __init__(self, config: QwenAudioTextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = QwenAudioAttention(config, layer_idx)


class QwenAudioTextModel(Qwen2Model):
    """The language model without its head."""

    config: QwenAudioTextConfig

    def __init__(self, config: QwenAudioTextConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(QwenAudioDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = QwenAudioRotaryEmbedding(config)
        self.prompt_stretch: torch.Tensor | None = None  # kept for `original_quirks` alone
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch pos"] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[torch.Tensor, "batch pos d_model"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As every model of transformers.

        Args:
            attention_mask: 1 for tokens, 0 for padding, of the cached positions and the new ones, ``[batch, keys]``.
            position_ids: accepted and not used: positions follow from the mask, as the original has it.

        Raises:
            ValueError: a mask of another shape; a cache whose keys were rotated for a shorter text.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = _cached(past_key_values)
        mask = self._mask_of_keys(attention_mask, inputs_embeds, past)
        positions, stretch = (
            self._original_positions(mask, past) if self.config.original_quirks else self._positions(mask, past)
        )
        causal = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,
        )
        states = inputs_embeds
        position_embeddings = self.rotary_emb(positions, stretch)
        query_scale = self._query_scale(positions)
        for layer in self.layers:
            states = layer(
                states,
                attention_mask=causal,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                query_scale=query_scale,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(states), past_key_values=past_key_values if use_cache else None
        )

    def _mask_of_keys(self, mask: torch.Tensor | None, embeds: torch.Tensor, past: int) -> torch.Tensor:
        if mask is None:
            return torch.ones(len(embeds), past + embeds.shape[1], dtype=torch.long, device=embeds.device)
        if mask.ndim != 2:
            raise ValueError(
                f"Qwen-Audio takes its positions from the mask, so it must be [batch, keys], not {list(mask.shape)}; "
                "edit attention in the layers instead (block.attn.inputs)."
            )
        return mask

    def _positions(self, mask: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Position of every new token in its row, ``[batch, pos]``, and the NTK factor of every row."""
        if self.outgrows_cache(mask, past):
            raise ValueError(
                f"with {int(mask.sum(-1).max())} tokens the rotary embeddings are stretched further than those in the "
                "cache, so the cache is of no use: run the whole sequence."
            )
        return (mask.cumsum(-1) - 1).clamp(min=0)[:, past:], self.rotary_emb.stretch(mask.sum(-1))

    def outgrows_cache(self, mask: Int[torch.Tensor, "batch keys"], past: int) -> bool:
        """Whether a row has another NTK factor than when the first ``past`` columns were all there was."""
        before, now = (self.rotary_emb.stretch(part.sum(-1)) for part in (mask[:, :past], mask))
        return past > 0 and not self.config.original_quirks and not torch.equal(before, now)

    def _original_positions(self, mask: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns count, padding or not; the factor is the prompt's, by tokens where columns exceed `seq_length`."""
        if past == 0 or self.prompt_stretch is None:
            columns = torch.full_like(mask[:, 0], mask.shape[1])
            lengths = mask.sum(-1) if mask.shape[1] > self.config.seq_length else columns
            self.prompt_stretch = self.rotary_emb.stretch(lengths)
        columns = torch.arange(past, mask.shape[1], device=mask.device)
        return columns.expand(len(mask), -1), self.prompt_stretch

    def _query_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        if not self.config.use_logn_attn or self.training:
            return None
        return (torch.log(positions + 1.0) / math.log(self.config.seq_length)).clamp(min=1)


def _cached(cache: Cache | None) -> int:
    """Positions in a cache; a static one counts them in a tensor."""
    return 0 if cache is None else int(cache.get_seq_length())


class QwenAudioPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the family."""

    config_class = QwenAudioConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["QwenAudioDecoderLayer", "Qwen2AudioEncoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True


class QwenAudioModel(QwenAudioPreTrainedModel):
    """Tower, projector and language model; clips are written over their placeholders before the first block."""

    def __init__(self, config: QwenAudioConfig) -> None:
        super().__init__(config)
        self.audio_tower = QwenAudioEncoder(config.audio_config)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config)
        self.audio_bos_eos_token = nn.Embedding(2, config.text_config.hidden_size)
        self.language_model = QwenAudioTextModel(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch pos"] | None = None,
        input_features: Float[torch.Tensor, "clips mel frames"] | None = None,
        feature_attention_mask: Int[torch.Tensor, "clips frames"] | None = None,
        inputs_embeds: Float[torch.Tensor, "batch pos d_model"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Either ids, with the clips that their placeholders stand for, or embeddings into which the clips are merged.

        Raises:
            ValueError: both or neither; features without their mask; another number of placeholders than of audio
                positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if input_features is not None:
                if feature_attention_mask is None:
                    raise ValueError("input_features need their feature_attention_mask.")
                heard = self.hear(input_features, feature_attention_mask)
                inputs_embeds = self.merge(input_ids, inputs_embeds, heard)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    def hear(
        self,
        input_features: Float[torch.Tensor, "clips mel frames"],
        feature_attention_mask: Int[torch.Tensor, "clips frames"],
    ) -> Float[torch.Tensor, "positions d_model"]:
        """The audio positions of all clips, one clip after the other."""
        mel_frames = feature_attention_mask.sum(-1)
        states = self.audio_tower(input_features, mel_frames, hears_on=self.config.original_quirks).last_hidden_state
        projected = self.multi_modal_projector(states)
        counts = audio_lengths(mel_frames).to(projected.device)
        return projected[_within(counts, projected.shape[1])]

    def merge(
        self,
        input_ids: Int[torch.Tensor, "batch pos"],
        embeds: Float[torch.Tensor, "batch pos d_model"],
        heard: Float[torch.Tensor, "positions d_model"],
    ) -> Float[torch.Tensor, "batch pos d_model"]:
        """Embeddings with the clips written over their placeholders, and the learned vectors over the tags."""
        is_audio = input_ids == self.config.audio_token_id
        if int(is_audio.sum()) != len(heard):
            raise ValueError(f"{int(is_audio.sum())} audio placeholders do not fit {len(heard)} audio positions.")
        embeds = embeds.masked_scatter(is_audio[..., None], heard.to(embeds.device, embeds.dtype))
        for offset, tag in enumerate(self.audio_bos_eos_token.weight.to(embeds.device, embeds.dtype)):
            is_tag = input_ids == self.config.audio_start_token_id + offset
            embeds = torch.where(is_tag[..., None], tag, embeds)
        return embeds


class QwenAudioForConditionalGeneration(CausalLMWithEars, QwenAudioPreTrainedModel, GenerationMixin):
    """Qwen-Audio with its head."""

    def __init__(self, config: QwenAudioConfig) -> None:
        super().__init__(config)
        self.model = QwenAudioModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the next step takes; the whole text again where the cache is outgrown.

        The clips go with the steps that see their placeholders.
        """
        audio = {"input_features": input_features, "feature_attention_mask": feature_attention_mask}
        past = _cached(past_key_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        whole = input_ids.shape == mask.shape  # not so where generation began with embeddings
        anew = whole and self.model.language_model.outgrows_cache(mask, past)
        if anew and past_key_values is not None:
            past_key_values.crop(-past)
            next_sequence_length = None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        inputs["attention_mask"] = attention_mask  # whole, for positions follow from it; a static cache's was 4-D
        return {**inputs, **audio} if is_first_iteration or anew or not use_cache else inputs


AutoModel.register(QwenAudioConfig, QwenAudioModel, exist_ok=True)
AutoModelForCausalLM.register(QwenAudioConfig, QwenAudioForConditionalGeneration, exist_ok=True)

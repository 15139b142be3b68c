"""Qwen-Audio's configuration: ours, in transformers' way, and how the published one is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, no_type_check

from transformers import AutoConfig, PreTrainedConfig, Qwen2AudioEncoderConfig, Qwen2Config

AUDIO_TOKEN_ID, AUDIO_START_ID = 151851, 155163
PUBLISHED_TYPE, PUBLISHED_CLASS = "qwen", "QWenLMHeadModel"  # which a text-only Qwen has, too


@no_type_check  # transformers checks the fields, and passes more than these to __init__
class QwenAudioTextConfig(Qwen2Config):
    """The language model: Qwen2's fields, and what is Qwen's own.

    Attributes:
        seq_length: tokens it was trained on; beyond them rotary embeddings are stretched and queries are scaled.
        use_dynamic_ntk: stretch the rotary embeddings (dynamic NTK).
        use_logn_attn: scale the queries by the logarithm of their position.
        original_quirks: see `QwenAudioConfig`.
    """

    model_type = "qwen_audio_text"

    seq_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    original_quirks: bool = False


@no_type_check  # transformers checks the fields, and passes more than these to __init__
class QwenAudioConfig(PreTrainedConfig):
    """The whole model: an audio tower, a projector, a language model.

    Attributes:
        audio_config: the tower, a `Qwen2AudioEncoderConfig` (the two towers are built alike).
        text_config: the language model, a `QwenAudioTextConfig`.
        audio_token_id: the placeholder that one audio position takes in the text.
        audio_start_token_id: ``<audio>``; ``</audio>`` is the next id.
        original_quirks: compute what the original code computes where that is a fault: in a batch, a shorter clip's end
            hears the longer clip's sound, positions count the padding, and the stretch of the rotary embeddings stays
            as it was at the prompt.
    """

    model_type = "qwen_audio"
    sub_configs: ClassVar[dict[str, type]] = {
        "audio_config": Qwen2AudioEncoderConfig,
        "text_config": QwenAudioTextConfig,
    }

    audio_config: Any = None
    text_config: Any = None
    audio_token_id: int = AUDIO_TOKEN_ID
    audio_start_token_id: int = AUDIO_START_ID
    original_quirks: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.audio_config, PreTrainedConfig):
            self.audio_config = Qwen2AudioEncoderConfig(**{"num_mel_bins": 80, **(self.audio_config or {})})
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = QwenAudioTextConfig(**(self.text_config or {}))
        self.text_config.original_quirks = self.original_quirks
        super().__post_init__(**kwargs)

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **kwargs: Any) -> QwenAudioConfig:
        """From a config.json as published with the original code, and fields to set (see `fields_from_published`)."""
        return cls(**fields_from_published(published), **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers has it; a published config.json arrives as ours, so `from_pretrained` opens both.

        Raises:
            ValueError: a text-only Qwen.
        """
        fields, others = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == PUBLISHED_TYPE:
            fields = fields_from_published(fields)
        if "original_quirks" in others:  # transformers would set it when the language model's part is made already
            fields["original_quirks"] = others.pop("original_quirks")
        return fields, others


def fields_from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json as published with the original code (flat, model type "qwen"), as ours.

    Raises:
        ValueError: no audio section: a text-only Qwen.
    """
    if "audio" not in published:
        raise ValueError('this "qwen" configuration has no audio section: it is a text-only Qwen, not Qwen-Audio.')
    ears = published["audio"]
    audio_config = dict(
        num_mel_bins=ears["n_mels"],
        d_model=ears["n_state"],
        encoder_layers=ears["n_layer"],
        encoder_attention_heads=ears["n_head"],
        encoder_ffn_dim=4 * ears["n_state"],
        max_source_positions=ears["n_ctx"],
    )
    text_config = dict(
        vocab_size=published["vocab_size"],
        hidden_size=published["hidden_size"],
        intermediate_size=published["intermediate_size"] // 2,  # it counts both halves of the gated MLP
        num_hidden_layers=published["num_hidden_layers"],
        num_attention_heads=published["num_attention_heads"],
        num_key_value_heads=published["num_attention_heads"],
        max_position_embeddings=published.get("max_position_embeddings", 8192),
        rms_norm_eps=published["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(published["rotary_emb_base"])},
        seq_length=published["seq_length"],
        use_dynamic_ntk=published["use_dynamic_ntk"],
        use_logn_attn=published["use_logn_attn"],
    )
    return dict(
        model_type=QwenAudioConfig.model_type,
        architectures=[PUBLISHED_CLASS],
        audio_config=audio_config,
        text_config=text_config,
        audio_start_token_id=ears["audio_start_id"],
    )


AutoConfig.register(QwenAudioConfig.model_type, QwenAudioConfig, exist_ok=True)
AutoConfig.register(QwenAudioTextConfig.model_type, QwenAudioTextConfig, exist_ok=True)

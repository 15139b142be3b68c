"""A Whisper-style audio tower, opened layer by layer for TransformerLens: what most families' ears have in common.

TransformerLens wraps an audio tower as one closed box. Here is the inside of the kind that nearly all audio-language
models use (two convolutions, position embeddings, pre-norm blocks), under TransformerLens's names:

    audio_encoder.blocks[i].ln1   .attn (.q .k .v .o)   .ln2   .mlp (.in .out)

A family's adapter takes it by inheritance: ``class HookedX(WhisperTower, SomeArchitectureAdapter)``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    LinearBridge,
    NormalizationBridge,
    SymbolicBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


class WhisperTower:
    """Mixin for a TransformerLens `ArchitectureAdapter`: adds ``audio_encoder`` with its ``blocks``.

    Attributes:
        tower: path of the tower in the transformers module.
    """

    tower: ClassVar[str] = "model.audio_tower"
    cfg: Any
    components: dict[str, Any]

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        self.components["audio_encoder"] = whisper_tower(self.tower, self.cfg, SimpleNamespace())

    def prepare_model(self, hf_model: Any) -> None:
        """TransformerLens's config describes the language model alone; the tower's heads arrive with the model."""
        super().prepare_model(hf_model)  # type: ignore[misc]
        config = hf_model.get_submodule(self.tower).config
        heads, width = config.encoder_attention_heads, config.d_model
        dimensions = SimpleNamespace(n_heads=heads, d_model=width, d_head=width // heads)
        self.components["audio_encoder"] = whisper_tower(self.tower, self.cfg, dimensions)

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """TransformerLens splits heads in the hooks of the language model's blocks alone; here the tower's, too."""
        for block in bridge.audio_encoder.blocks:
            block.attn.setup_hook_compatibility()


def whisper_tower(path: str, cfg: Any, dimensions: SimpleNamespace) -> GeneralizedComponent:
    """The tower at ``path`` as a component with ``blocks``.

    Args:
        cfg: TransformerLens's configuration of the language model.
        dimensions: the tower's own ``n_heads``, ``d_model`` and ``d_head``, as far as they are known.
    """
    blocks = BlockBridge(
        name="layers",
        config=cfg,
        hook_alias_overrides={"hook_mlp_out": "mlp.out.hook_out"},
        submodules={
            "ln1": _norm("self_attn_layer_norm", cfg),
            "attn": AttentionBridge(
                name="self_attn",
                config=dimensions,
                is_causal=False,
                submodules={
                    "q": LinearBridge(name="q_proj"),
                    "k": LinearBridge(name="k_proj"),
                    "v": LinearBridge(name="v_proj"),
                    "o": LinearBridge(name="out_proj"),
                },
            ),
            "ln2": _norm("final_layer_norm", cfg),
            "mlp": SymbolicBridge(submodules={"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}),
        },
    )
    return GeneralizedComponent(name=path, submodules={"blocks": blocks})


def _norm(name: str, cfg: Any) -> NormalizationBridge:
    # The wrapped LayerNorm runs its own forward: its epsilon is not the language model's.
    return NormalizationBridge(name=name, config=cfg, use_native_layernorm_autograd=True)

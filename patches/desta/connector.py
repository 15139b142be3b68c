"""DeSTA's connector: learned queries ask several layers of Whisper, and a learned mixture joins the answers.

    qformer     [clips, targets, queries, width]   what the queries of each target layer have gathered
    mixture     [queries, targets]                 how much of each target layer a query takes; rows add up to 1
    proj        [clips, queries, d_model]          the vectors that the language model reads

Source: DeSTA2 (arXiv 2409.20007) and DeSTA2.5-Audio (arXiv 2507.02768). The Q-Former is a post-norm BERT encoder with
cross-attention. Its queries see each other and all frames of the window, the silence behind a clip included.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import nn

from audio_lens_plugin.patches.desta.configuration import DestaConfig

EPSILON = 1e-12  # of BERT's norms


class Attention(nn.Module):
    """Multi-head attention of queries to ``source``, added to the queries and normed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(
        self, queries: Float[torch.Tensor, "*rows queries width"], source: Float[torch.Tensor, "*rows frames width"]
    ) -> Float[torch.Tensor, "*rows queries width"]:
        """Queries after they have taken from the source what they asked for."""
        query, key, value = (
            rearrange(part, "... place (head size) -> ... head place size", head=self.heads)
            for part in (self.q_proj(queries), self.k_proj(source), self.v_proj(source))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = rearrange(mixed, "... head place size -> ... place (head size)")
        return self.norm(self.out_proj(mixed) + queries)


class QFormerLayer(nn.Module):
    """Queries look at each other, then at the encoder's frames, then think."""

    def __init__(self, width: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.cross_attn = Attention(width, heads)
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(
        self, queries: Float[torch.Tensor, "*rows queries width"], frames: Float[torch.Tensor, "*rows frames width"]
    ) -> Float[torch.Tensor, "*rows queries width"]:
        """Queries after one layer."""
        queries = self.cross_attn(self.self_attn(queries, queries), frames)
        return self.norm(self.fc2(nn.functional.gelu(self.fc1(queries))) + queries)


class QFormer(nn.Module):
    """All layers; target layers are rows, they share the weights."""

    def __init__(self, config: DestaConfig) -> None:
        super().__init__()
        ears = config.audio_config
        self.layers = nn.ModuleList(
            QFormerLayer(ears.d_model, ears.encoder_attention_heads, config.qformer_intermediate_size)
            for _ in range(config.qformer_layers)
        )

    def forward(
        self, queries: Float[torch.Tensor, "*rows queries width"], frames: Float[torch.Tensor, "*rows frames width"]
    ) -> Float[torch.Tensor, "*rows queries width"]:
        """Query states of every clip and target layer."""
        for layer in self.layers:
            queries = layer(queries, frames)
        return queries


class DestaConnector(nn.Module):
    """From the encoder's states to vectors of the language model's width."""

    def __init__(self, config: DestaConfig) -> None:
        super().__init__()
        width, targets = config.audio_config.d_model, len(config.target_layers)
        self.target_layers = config.target_layers
        self.layer_prompts = nn.ParameterList(
            nn.Parameter(torch.randn(1, config.prompt_size, width)) for _ in range(targets)
        )
        self.layer_weights = nn.Parameter(torch.zeros(config.prompt_size, targets))
        self.qformer = QFormer(config)
        self.mixture = nn.Softmax(dim=-1)
        self.proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.text_config.hidden_size))

    def forward(
        self, encoder_states: tuple[Float[torch.Tensor, "clips frames width"], ...]
    ) -> Float[torch.Tensor, "clips queries d_model"]:
        """Args:
        encoder_states: what enters the encoder's first layer, then the output of each.
        """
        frames = torch.stack([encoder_states[layer] for layer in self.target_layers], dim=1)
        queries = torch.cat(list(self.layer_prompts)).expand(len(frames), -1, -1, -1)
        gathered = self.qformer(queries, frames)
        shares = self.mixture(self.layer_weights)
        return self.proj(torch.einsum("ctqw,qt->cqw", gathered, shares))

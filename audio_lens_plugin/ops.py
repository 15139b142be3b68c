"""The only code that runs inside a traced block, here or on a server.

A server that runs our traces does not have this package: what it executes arrives as source. Hence the rules of this
room: torch is the only import, imports stand at the top, and there are no classes. Modules arrive as nnsight envoys;
reading `block.output` waits for the forward pass to reach it, so sites are read in forward order.
"""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_ROWS = 128
"""Rows that meet the unembedding at once: 128 rows of a 152,000-word vocabulary take 78 MB in fp32."""


def heads(flat: torch.Tensor, d_head: int) -> torch.Tensor:
    """Split the last axis into heads: ``[..., heads * d_head] -> [..., heads, d_head]``."""
    return flat.unflatten(-1, (-1, d_head))


SITES: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "hook_resid_pre": lambda block, d_head: block.input,
    "ln1.hook_in": lambda block, d_head: block.ln1.input,
    "ln1.hook_out": lambda block, d_head: block.ln1.output,
    "attn.hook_q": lambda block, d_head: heads(block.attn.q.output, d_head),
    "attn.hook_k": lambda block, d_head: heads(block.attn.k.output, d_head),
    "attn.hook_v": lambda block, d_head: heads(block.attn.v.output, d_head),
    "attn.hook_z": lambda block, d_head: heads(block.attn.o.input, d_head),
    "hook_attn_out": lambda block, d_head: block.attn.output[0],
    "hook_resid_mid": lambda block, d_head: block.ln2.input,
    "ln2.hook_out": lambda block, d_head: block.ln2.output,
    "mlp.hook_pre": lambda block, d_head: block.mlp.gate.output,
    "mlp.hook_pre_linear": lambda block, d_head: getattr(block.mlp, "in").output,
    "mlp.hook_post": lambda block, d_head: block.mlp.out.input,
    "hook_mlp_out": lambda block, d_head: block.mlp.output,
    "hook_resid_post": lambda block, d_head: block.output,
}
"""A text block's activations under TransformerLens's hook names, in forward order: how nnsight reads each."""


def write_back(blocks: Any) -> None:
    """Put every block's output back as it is: an edit that must change nothing."""
    for block in blocks:
        block.output = block.output.clone()


def write_masks_back(blocks: Any) -> None:
    """Put every attention's inputs, its mask among them, back as they are: a knockout of nothing."""
    for block in blocks:
        args, kwargs = block.attn.inputs
        mask = kwargs.get("attention_mask")
        block.attn.inputs = (args, {**kwargs, "attention_mask": None if mask is None else mask.clone()})


def vocabulary_scores(
    normed: torch.Tensor, unembed: Any, label_ids: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a model says in states ``[rows, d_model]`` that have passed the final norm.

    Only `CHUNK_ROWS` rows of logits exist at a time. Scores are fp32 whatever the model's dtype; the unembedding runs
    in the model's own.

    Returns:
        label logits ``[rows, labels]``; log of the softmax's denominator ``[rows]``; ids and logits of the ``top_k``
        best words ``[rows, top_k]``.
    """
    device = unembed.weight.device
    ids = label_ids.to(device)
    label_logits, log_partition, top_ids, top_logits = [], [], [], []
    for rows in normed.to(device).split(CHUNK_ROWS):
        logits = unembed(rows)
        label_logits.append(logits[:, ids].float())
        log_partition.append(torch.logsumexp(logits.float(), dim=-1))
        best = torch.topk(logits, top_k, dim=-1)
        top_ids.append(best.indices)
        top_logits.append(best.values.float())
    return torch.cat(label_logits), torch.cat(log_partition), torch.cat(top_ids), torch.cat(top_logits)


def token_log_probs(normed: torch.Tensor, unembed: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor]:
    """Log-probability of one given token per state ``[rows, d_model]`` that has passed the final norm: ``[rows]``."""
    device = unembed.weight.device
    states, tokens = normed.to(device).split(CHUNK_ROWS), token_ids.to(device).split(CHUNK_ROWS)
    log_probs = []
    for rows, wanted in zip(states, tokens, strict=True):
        logits = unembed(rows).float()
        log_probs.append(logits.gather(-1, wanted[:, None])[:, 0] - torch.logsumexp(logits, dim=-1))
    return (torch.cat(log_probs),)


def read_layers(
    blocks: Any,
    ln_final: Any,
    rows: torch.Tensor,
    cols: torch.Tensor,
    score: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """Score every layer's states at (row, position) pairs in the forward pass that is running.

    Layer axis: 0 = the embeddings, l = after block l. The final norm is recomputed at every layer. As many layers as
    fill one chunk are scored together: the weights of the unembedding, the largest of the model, are then read once
    for all of them, and no more states than a chunk wait.

    Args:
        score: takes normed states ``[layers * pairs, d_model]`` of some layers, gives tensors with that leading axis.

    Returns:
        what ``score`` gives, for all layers: ``[layers + 1, pairs, ...]``.
    """
    device = ln_final.weight.device
    together = max(1, CHUNK_ROWS // len(rows))
    found, waiting = [], []
    for layer in range(len(blocks) + 1):
        state = blocks[0].input if layer == 0 else blocks[layer - 1].output
        waiting.append(ln_final(state[rows, cols].to(device)))
        if len(waiting) == together or layer == len(blocks):
            scores = score(torch.cat(waiting))
            found.append([part.unflatten(0, (len(waiting), len(rows))) for part in scores])
            waiting = []
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def lens(
    blocks: Any,
    ln_final: Any,
    unembed: Any,
    rows: torch.Tensor,
    cols: torch.Tensor,
    label_ids: torch.Tensor,
    top_k: int,
) -> list[torch.Tensor]:
    """The logit lens: the four tensors of `vocabulary_scores` for all layers, ``[layers + 1, pairs, ...]``."""
    return read_layers(
        blocks, ln_final, rows, cols, lambda normed: vocabulary_scores(normed, unembed, label_ids, top_k)
    )


def lens_of_tokens(
    blocks: Any, ln_final: Any, unembed: Any, rows: torch.Tensor, cols: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Log-probability, at every layer, of one given token per (row, position) pair: ``[layers + 1, pairs]``."""

    def score(normed: torch.Tensor) -> tuple[torch.Tensor]:
        return token_log_probs(normed, unembed, token_ids.repeat(len(normed) // len(token_ids)))

    return read_layers(blocks, ln_final, rows, cols, score)[0]

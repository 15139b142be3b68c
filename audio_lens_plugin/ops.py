"""The only code that runs inside a traced block, here or on a server.

A server that runs our traces does not have this package: what it executes arrives as source. Hence the rules of this
room: torch is the only import, imports stand at the top, and there are no classes. Modules arrive as nnsight envoys;
reading `block.output` waits for the forward pass to reach it, so sites are read in forward order.
"""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_ROWS = 256
"""Rows that meet the unembedding at once: 256 rows of a 152,000-word vocabulary take 0.16 GB in fp32."""


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


def normed_states(blocks: Any, ln_final: Any, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Residual states of all layers at (row, position) pairs after the final norm, recomputed at every layer.

    Layer axis: 0 = the embeddings, l = after block l. All layers stand in one tensor so that they can meet the
    unembedding together: its weights, the largest of the model, are then read once and not once per layer.

    Returns:
        ``[layers + 1, pairs, d_model]``.
    """
    device = ln_final.weight.device
    normed = [ln_final(blocks[0].input[rows, cols].to(device))]
    for block in blocks:
        normed.append(ln_final(block.output[rows, cols].to(device)))
    return torch.stack(normed)


def lens(
    blocks: Any,
    ln_final: Any,
    unembed: Any,
    rows: torch.Tensor,
    cols: torch.Tensor,
    label_ids: torch.Tensor,
    top_k: int,
) -> list[torch.Tensor]:
    """The logit lens of all layers at (row, position) pairs, in the one forward pass that is running.

    Returns:
        the four tensors of `vocabulary_scores`, each with a leading axis ``layers + 1``.
    """
    normed = normed_states(blocks, ln_final, rows, cols)
    scores = vocabulary_scores(normed.flatten(0, 1), unembed, label_ids, top_k)
    return [score.unflatten(0, normed.shape[:2]) for score in scores]


def lens_of_tokens(
    blocks: Any, ln_final: Any, unembed: Any, rows: torch.Tensor, cols: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Log-probability, at every layer, of one given token per (row, position) pair: ``[layers + 1, pairs]``."""
    normed = normed_states(blocks, ln_final, rows, cols)
    targets = token_ids.to(unembed.weight.device).repeat(len(normed))
    log_probs = []
    for states, tokens in zip(
        normed.flatten(0, 1).to(unembed.weight.device).split(CHUNK_ROWS), targets.split(CHUNK_ROWS)
    ):
        logits = unembed(states).float()
        log_probs.append(logits.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(logits, dim=-1))
    return torch.cat(log_probs).unflatten(0, normed.shape[:2])

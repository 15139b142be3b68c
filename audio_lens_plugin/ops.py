"""The only code that runs inside a traced block, here or on a server.

A server that runs our traces does not have this package: what it executes arrives as source. Hence the rules of this
room: torch is the only import, imports stand at the top, and there are no classes. Modules arrive as nnsight envoys;
reading `block.output` waits for the forward pass to reach it, so sites are read in forward order.
"""

import math
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


def keep_run(
    blocks: Any, sites: list[tuple[int, str]], writes: dict[int, list[dict[str, Any]]], d_head: int
) -> tuple[list[torch.Tensor], list[Any], dict[str, Any], dict[tuple[int, str], torch.Tensor]]:
    """Keep everything of the forward pass that is running from which edited passes can go on.

    Args:
        sites: (layer, name) of the activations to keep beside the residual stream.
        writes: edits of the run itself, by layer (see `written`).

    Returns:
        the state that enters every block, and that which leaves the last, ``[batch, pos, d_model]``; the cache;
        the keywords that the model gives its blocks; the activations of ``sites``, heads split.
    """
    states, kept = [], {}
    for layer, block in enumerate(blocks):
        args, given = block.inputs
        if layer == 0:
            frame = {name: value for name, value in given.items() if name in FRAME}
            cache = given["past_key_values"]
        entering = written(args[0], writes.get(layer, []), "hook_resid_pre", d_head)
        if entering is not args[0]:
            block.inputs = ((entering, *args[1:]), given)
        states.append(entering)
        for site in SITES:
            edit_site(block, writes.get(layer, []), site, d_head)
            if (layer, site) in sites:
                kept[layer, site] = SITES[site](block, d_head)
    states.append(blocks[-1].output)
    return states, [(part.keys, part.values) for part in cache.layers], frame, kept


def gradients(
    blocks: Any,
    ln_final: Any,
    unembed: Any,
    label_ids: torch.Tensor,
    truth: torch.Tensor,
    foil: torch.Tensor,
    writes: list[dict[str, Any]],
    d_head: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The states that enter every block, and what each row's logit difference gains along them.

    Args:
        truth: index of the true label of each row.
        foil: index of the label that it is held against; -1 for the best of the others.
        writes: edits of what enters the first block.

    Returns:
        states and gradients, ``[batch, pos, d_model]`` per layer.
    """
    args, given = blocks[0].inputs
    entering = written(args[0], writes, "hook_resid_pre", d_head).detach().requires_grad_()
    blocks[0].inputs = ((entering, *args[1:]), given)
    states = [entering, *(block.input for block in list(blocks)[1:])]
    last = ln_final(blocks[-1].output[:, -1])
    logits = unembed(last)[:, label_ids.to(unembed.weight.device)].float()
    truth, foil = truth.to(logits.device)[:, None], foil.to(logits.device)[:, None]
    others = logits.scatter(1, truth, -torch.inf)
    against = torch.where(foil < 0, others.amax(1, keepdim=True), logits.gather(1, foil.clamp(min=0)))
    found = torch.autograd.grad((logits.gather(1, truth) - against).sum(), states)
    return [state.detach() for state in states], list(found)


def mean_states(blocks: Any, cols: list[torch.Tensor]) -> torch.Tensor:
    """What leaves every block, averaged over some positions of each row.

    Args:
        cols: of each row, its positions.

    Returns:
        ``[layers, rows, d_model]``, in fp32 on the CPU.
    """
    means = []
    for block in blocks:
        state = block.output
        means.append(torch.stack([state[row, chosen].float().mean(0) for row, chosen in enumerate(cols)]).cpu())
    return torch.stack(means)


def keep_tower(blocks: Any) -> list[torch.Tensor]:
    """What enters every block of the audio tower, and what leaves the last: ``[clips, frames, d]`` each."""
    states = [block.input for block in blocks]
    return [*states, first_of(blocks[-1].output)]


def rerun_tower(blocks: Any, states: list[torch.Tensor], writes: list[dict[str, Any]]) -> None:
    """Go on with the audio tower from stored states; each row of the running pass has one edit.

    Blocks up to the first one that is edited give what they gave: a model may read what leaves any of them.

    Args:
        states: of one clip, as `keep_tower` gives them, ``[1, frames, d]``.
        writes: by row: ``layer`` (the block whose output is edited), ``frames`` and ``values``.
    """
    first = min(write["layer"] for write in writes)
    width = blocks[0].input.shape[1]  # some towers run no more frames than the longest clip of the batch has
    for layer, block in enumerate(blocks):
        stored = states[layer + 1][:, :width].expand(len(writes), -1, -1)
        if layer < first:
            block.skip(stored)
        elif layer == first:
            block.skip(edited_tower(stored, stored, writes, layer))
        elif any(write["layer"] == layer for write in writes):
            given = block.output
            new = edited_tower(first_of(given), stored, writes, layer)
            block.output = (new, *given[1:]) if isinstance(given, tuple) else new


def edited_tower(state: torch.Tensor, stored: torch.Tensor, writes: list[dict[str, Any]], layer: int) -> torch.Tensor:
    """The rows that are edited at this layer go on from the stored state."""
    state = state.clone()
    for row, write in enumerate(writes):
        if write["layer"] == layer:
            state[row] = stored[row]
            state[row, write["frames"].to(state.device)] = write["values"].to(state.device, state.dtype)
    return state


def first_of(output: Any) -> torch.Tensor:
    """The state among a block's outputs."""
    return output[0] if isinstance(output, tuple) else output


FRAME = ("attention_mask", "position_embeddings", "position_ids", "query_scale")
"""Keywords of a block that differ from row to row or from position to position."""


def run_wave(
    blocks: Any,
    states: list[torch.Tensor],
    cache: list[tuple[torch.Tensor, torch.Tensor]],
    frame: dict[str, Any],
    wave: dict[str, Any],
) -> torch.Tensor:
    """Run edited passes together; a pass joins at the first layer that it edits.

    The forward pass that is running is only the carrier: each block is given the states of the rows that have joined,
    the stored keys and values of the positions before ``wave["first_col"]``, and the keywords that the stored run gave
    its blocks, cut to these rows and to the positions from there on.

    Args:
        states: of the stored run, as `keep_run` gives them.
        cache: likewise.
        frame: likewise.
        wave: ``rows`` (row of the stored run that each pass edits, in the order in which they join), ``joined`` (how
            many have joined at each layer, and after the last), ``first_col``, ``d_head``, ``writes`` and ``cuts`` (by
            layer; ``row`` is the pass, columns count from ``first_col``).

    Returns:
        what leaves the last block at the last position, ``[passes, d_model]``.
    """
    first_col, d_head, joined = wave["first_col"], wave["d_head"], wave["joined"]
    depth = len(blocks)
    first_layer = next(layer for layer in range(depth + 1) if joined[layer])
    carried = states[0][:1, first_col:]
    for block in list(blocks)[:first_layer]:
        block.skip(carried)
    running = carried[:0]
    for layer in range(first_layer, depth):
        block, writes, cuts = blocks[layer], wave["writes"].get(layer, []), wave["cuts"].get(layer, [])
        args, given = block.inputs
        running = joining(running if layer == first_layer else args[0], states[layer], wave, layer)
        rows = wave["rows"][: joined[layer]].to(running.device)
        running = written(running, writes, "hook_resid_pre", d_head)
        cut_frame = {name: cut_to(name, value, rows, first_col) for name, value in frame.items()}
        mask = causal_mask(cut_frame.get("attention_mask"), rows, first_col, states[0].shape[1])
        cut_frame["attention_mask"] = masked(mask, cuts, running.dtype, wave["n_heads"])
        if first_col:
            given["past_key_values"].update(*(part[rows, :, :first_col] for part in cache[layer]), layer)
        block.inputs = ((running, *args[1:]), {**given, **cut_frame})
        for site in SITES:
            edit_site(block, writes, site, d_head)
            if site == "hook_attn_out" and any(cut["how"] != "mask" for cut in cuts):
                reweigh(block, cuts, given["past_key_values"].layers[layer])
        running = block.output
        done = given["past_key_values"].layers[layer]  # its keys and values are not read again
        done.keys, done.values = done.keys[:0], done.values[:0]
    running = joining(running[:, -1:], states[depth][:, -1:], {**wave, "first_col": 0}, depth)
    return written(running, wave["writes"].get(depth, []), "hook_resid_pre", d_head)[:, -1]


def joining(running: torch.Tensor, stored: torch.Tensor, wave: dict[str, Any], layer: int) -> torch.Tensor:
    """The running passes, then those that join at this layer with their row's stored state."""
    new = wave["rows"][len(running) : wave["joined"][layer]].to(stored.device)
    return torch.cat([running, stored[new, wave["first_col"] :].to(running.device)]) if len(new) else running


def cut_to(name: str, value: Any, rows: torch.Tensor, first_col: int) -> Any:
    """A keyword of the stored run for these rows, from ``first_col`` on."""
    if isinstance(value, tuple):
        return tuple(cut_to(name, part, rows, first_col) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    per_row = {"attention_mask": -4, "position_embeddings": -3}.get(name, -2)
    per_position = {"attention_mask": -2, "position_embeddings": -2}.get(name, -1)
    if value.shape[per_row] > 1:
        value = value.index_select(per_row, rows.to(value.device))
    else:
        sizes = [-1] * value.ndim
        sizes[per_row] = len(rows)
        value = value.expand(sizes)
    return value.narrow(per_position, first_col, value.shape[per_position] - first_col)


def causal_mask(mask: torch.Tensor | None, rows: torch.Tensor, first_col: int, length: int) -> torch.Tensor:
    """The mask ``[rows, 1, queries, keys]``; where a model needs none, because nothing is padded, the causal one."""
    if mask is not None:
        return mask
    triangle = torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()
    return triangle[first_col:].expand(len(rows), 1, -1, -1)


def masked(mask: torch.Tensor, cuts: list[dict[str, Any]], dtype: torch.dtype, n_heads: int) -> torch.Tensor:
    """The mask with these cuts: blocked keys masked, weaker or stronger ones weighted before the softmax."""
    cuts = [cut for cut in cuts if cut["how"] == "mask"]
    if not cuts:
        return mask
    if any(cut["strength"] for cut in cuts) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    mask = mask.expand(-1, n_heads if any(cut["heads"] is not None for cut in cuts) else 1, -1, -1).clone()
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    for cut in cuts:
        heads_cut = slice(None) if cut["heads"] is None else cut["heads"][:, None, None]
        place = (cut["row"], heads_cut, cut["queries"][:, None], cut["keys"])
        mask[place] = blocked if cut["strength"] == 0 else mask[place] + math.log(cut["strength"])
    return mask


def reweigh(block: Any, cuts: list[dict[str, Any]], cache: Any) -> None:
    """Change attention weights after the softmax (see `reweighed`) in the block that is running.

    Args:
        cache: the block's keys and values; whole only once its attention has run.
    """
    out, weights = block.attn.output[:2]
    block.attn.output = (reweighed(out, weights, cuts, cache.values, block.attn.o), *block.attn.output[1:])


def reweighed(
    out: torch.Tensor,
    weights: torch.Tensor,
    cuts: list[dict[str, Any]],
    values: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What attention gives where its weights are changed after the softmax: computed anew for the cut queries.

    Args:
        out: what it gave, ``[rows, queries, d_model]``.
        weights: its weights, ``[rows, heads, queries, keys]``.
        values: ``[rows, kv_heads, keys, d_head]``.
        project: the projection that mixes the heads.
    """
    changed = weights.clone()
    out = out.clone()
    for cut in cuts:
        if cut["how"] == "mask":
            continue
        row, queries, keys = cut["row"], cut["queries"], cut["keys"]
        which = torch.arange(weights.shape[1]) if cut["heads"] is None else cut["heads"]
        place = (row, which[:, None, None], queries[:, None], keys)
        old = weights[place]
        changed[place] = cut["strength"] * (old if cut["how"] == "zero" else old.mean(-1, keepdim=True).expand_as(old))
        mixed = changed[row][:, queries] @ values[row].repeat_interleave(weights.shape[1] // values.shape[1], dim=0)
        out[row, queries] = project(mixed.transpose(0, 1).flatten(1))
    return out


def attention_mass(blocks: Any, share: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much of its attention every head has on some keys. Needs attention that gives its weights (eager).

    Args:
        share: how much each query counts, ``[batch, pos]``; rows add up to 1.
        keys: 1 where a key counts, ``[batch, pos]``.

    Returns:
        ``[layers, batch, heads]``.
    """
    masses = []
    for block in blocks:
        weights = block.attn.output[1].float()
        masses.append(torch.einsum("bq,bhqk,bk->bh", share.to(weights.device), weights, keys.to(weights.device)).cpu())
    return torch.stack(masses)


def edit_site(block: Any, writes: list[dict[str, Any]], site: str, d_head: int) -> None:
    """Write at one site of the block that is running, if there is anything to write."""
    if not any(one["site"] == site for one in writes) or site == "hook_resid_pre":
        return
    if site == "hook_resid_mid":
        # The tensor that enters ln2 is also the residual that goes round the MLP: it is changed in place.
        inside = block.ln2.input
        inside[:] = written(inside, writes, site, d_head)
    elif site == "hook_attn_out":
        block.attn.output = (written(block.attn.output[0], writes, site, d_head), *block.attn.output[1:])
    elif site == "hook_mlp_out":
        block.mlp.output = written(block.mlp.output, writes, site, d_head)
    elif site == "hook_resid_post":
        block.output = written(block.output, writes, site, d_head)
    elif site == "attn.hook_z":
        block.attn.o.input = written(block.attn.o.input, writes, site, d_head)
    elif site == "mlp.hook_post":
        block.mlp.out.input = written(block.mlp.out.input, writes, site, d_head)
    else:
        part = getattr(block.attn, site.removeprefix("attn.hook_"))
        part.output = written(part.output, writes, site, d_head)


def written(state: torch.Tensor, writes: list[dict[str, Any]], site: str, d_head: int) -> torch.Tensor:
    """A state ``[rows, pos, width]`` with the writes at one site: ``keep`` times the old value plus ``values``."""
    writes = [one for one in writes if one["site"] == site]
    if not writes:
        return state
    new = state.clone()
    for one in writes:
        row, cols, units = new[one["row"]], one["cols"].to(new.device), one["units"]
        if site.startswith("attn."):
            row = heads(row, d_head)
        place = (cols,) if units is None else (cols[:, None], units.to(new.device))
        row[place] = one["keep"] * row[place] + one["values"].to(new.device, new.dtype)
    return new


def last_scores(
    states: torch.Tensor,
    ln_final: Any,
    unembed: Any,
    label_ids: torch.Tensor,
    reference: torch.Tensor | None,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What states ``[passes, d_model]`` that left the last block say next.

    Args:
        reference: log-probabilities ``[rows, d_vocab]`` that the passes are held against; None for none.
        rows: row of ``reference`` of each pass.

    Returns:
        label logits ``[passes, labels]``; log of the softmax's denominator ``[passes]``; rank of each label in the
        vocabulary, 0 on top ``[passes, labels]``; divergence from the reference (nats; NaN without one) ``[passes]``.
    """
    device = unembed.weight.device
    ids, found = label_ids.to(device), []
    for chunk, of_rows in zip(states.split(CHUNK_ROWS), rows.split(CHUNK_ROWS), strict=True):
        logits = unembed(ln_final(chunk.to(ln_final.weight.device)).to(device)).float()
        partition = torch.logsumexp(logits, dim=-1)
        labels = logits[:, ids]
        ranks = torch.stack([(logits > one[:, None]).sum(-1) for one in labels.unbind(-1)], dim=-1)
        divergence = torch.full_like(partition, torch.nan)
        if reference is not None:
            wanted = reference.to(device)[of_rows.to(device)]
            divergence = (wanted.exp() * (wanted - logits + partition[:, None])).sum(-1)
        found.append((labels, partition, ranks, divergence))
    logits, partition, ranks, divergence = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, partition, ranks, divergence


def last_log_probs(states: torch.Tensor, ln_final: Any, unembed: Any) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary after states ``[rows, d_model]`` that left the last block."""
    normed = ln_final(states.to(ln_final.weight.device))
    return unembed(normed.to(unembed.weight.device)).float().log_softmax(-1)


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

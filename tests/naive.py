"""The loop that the engine must agree with: one full forward pass per cell, plain torch hooks, nothing shared."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.recipes.cells import Cell, Cut, Write


def naive(lalm: LALM, batch: PromptBatch, cells: list[Cell], row_of: Any = None) -> torch.Tensor:
    """Last-position logits of every cell, ``[cells, d_vocab]``."""
    twin = weight_sharing_twin(lalm.module)
    blocks = twin.get_decoder().layers
    inputs = lalm.inputs(batch)
    return torch.stack([_one(twin, blocks, inputs, cell, lalm.d_head) for cell in cells])


def _one(twin: Any, blocks: Any, inputs: dict[str, Any], cell: Cell, d_head: int) -> torch.Tensor:
    with ExitStack() as hooks, torch.no_grad():
        for edit in cell.edits:
            hook = _writing if isinstance(edit, Write) else _cutting
            for handle in hook(blocks[edit.layer], edit, cell.row, d_head):
                hooks.callback(handle.remove)
        return twin(**inputs, use_cache=False).logits[cell.row, -1]


def _writing(block: Any, write: Write, row: int, d_head: int) -> list[Any]:
    def new(state: torch.Tensor) -> torch.Tensor:
        state = state.clone()
        mine = state[row]
        if write.site.startswith("attn."):
            mine = mine.unflatten(-1, (-1, d_head))
        for index, col in enumerate(write.cols.tolist()):
            if write.units is None:
                mine[col] = write.keep * mine[col] + write.values[index]
            else:
                for place, unit in enumerate(write.units):
                    mine[col, unit] = write.keep * mine[col, unit] + write.values[index, place]
        return state

    entering = []
    on_input = lambda module, args: (new(args[0]), *args[1:])  # noqa: E731
    on_output = lambda module, args, out: (new(out[0]), *out[1:]) if isinstance(out, tuple) else new(out)  # noqa: E731
    by_site = {
        "hook_resid_pre": lambda: [block.register_forward_pre_hook(on_input)],
        "attn.hook_q": lambda: [block.self_attn.q_proj.register_forward_hook(on_output)],
        "attn.hook_k": lambda: [block.self_attn.k_proj.register_forward_hook(on_output)],
        "attn.hook_v": lambda: [block.self_attn.v_proj.register_forward_hook(on_output)],
        "attn.hook_z": lambda: [block.self_attn.o_proj.register_forward_pre_hook(on_input)],
        "hook_attn_out": lambda: [block.self_attn.register_forward_hook(on_output)],
        "hook_resid_mid": lambda: [
            block.register_forward_pre_hook(lambda module, args: entering.append(args[0])),
            block.self_attn.register_forward_hook(
                lambda module, args, out: (new(out[0] + entering[0]) - entering[0], *out[1:])
            ),
        ],
        "mlp.hook_post": lambda: [block.mlp.down_proj.register_forward_pre_hook(on_input)],
        "hook_mlp_out": lambda: [block.mlp.register_forward_hook(on_output)],
        "hook_resid_post": lambda: [block.register_forward_hook(on_output)],
    }
    return by_site[write.site]()


def _cutting(block: Any, cut: Cut, row: int, d_head: int) -> list[Any]:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        mask, hidden = kwargs["attention_mask"], kwargs.get("hidden_states", args[0] if args else None)
        rows, length = hidden.shape[:2]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        mask = mask.repeat(1, module.q_proj.out_features // d_head, 1, 1)
        for head in range(mask.shape[1]) if cut.heads is None else cut.heads:
            for query in cut.queries.tolist():
                for key in cut.keys.tolist():
                    if cut.strength == 0:
                        mask[row, head, query, key] = torch.finfo(torch.float32).min
                    else:
                        mask[row, head, query, key] += torch.tensor(cut.strength).log()
        return args, {**kwargs, "attention_mask": mask}

    return [block.self_attn.register_forward_pre_hook(hook, with_kwargs=True)]

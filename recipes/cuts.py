"""Who may not read whom: cuts of attention by the names of positions, and a model that lives with them.

1. Queries and keys are names (see `spans`). A query loses those of the keys that come before it. Keys that come after
   it, it never read; and its own position is always left to it, so no query is left with nothing to read.
2. `knocked_out` gives a model that runs with a cut in everything it does, generation too. A cut that reaches the last
   position of the prompt goes on while the model writes: every new token then stands where the last one stood, and
   reads the cut keys no more. The keys stay those of the prompt. So each step equals one pass over the whole text in
   which the prompt's queries and all that was written are cut off from the keys.

The model that lives with a cut is a twin: its own modules, hooks and names around the very same weights. The model
itself is not touched, whatever happens inside the context. (nnsight's edits would not do: they know nothing of what
runs outside a trace, such as whole labels.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int

from audio_lens_plugin import ops
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.recipes.cells import Cut, How, check_cut
from audio_lens_plugin.recipes.twins import BatchTwin, positions_of
from audio_lens_plugin.spans import Role

Reading = tuple[torch.Tensor, torch.Tensor]
"""Queries, and keys that all of them read."""


def readings(queries: Int[torch.Tensor, " queries"], keys: Int[torch.Tensor, " keys"]) -> list[Reading]:
    """Queries with the keys that come before them; queries that have the same ones stand together.

    Args:
        keys: in order.
    """
    before = torch.searchsorted(keys, queries)
    return [(queries[before == count], keys[:count]) for count in before.unique().tolist() if count]


def control_readings(batch: PromptBatch, row: int, name: str, cut: Sequence[Reading], seed: int) -> list[Reading]:
    """The same queries with as many keys that are neither audio nor among the named ones, drawn by chance.

    A query that can see fewer of them loses all but one. The draw depends on the prompt alone, not on its batch.
    """
    roles = batch.positions.roles[row]
    free = (roles != Role.PAD) & (roles != Role.AUDIO)
    free[positions_of(batch, row, name)] = False
    candidates = free.nonzero()[:, 0]
    random = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=random)]
    alike: dict[tuple[int, ...], list[int]] = {}
    for queries, keys in cut:
        for query in queries.tolist():
            seen = drawn[drawn < query]
            count = len(keys) if len(seen) >= len(keys) else max(len(seen) - 1, 0)
            alike.setdefault(tuple(sorted(seen[:count].tolist())), []).append(query)
    return [(torch.tensor(queries), torch.tensor(keys)) for keys, queries in alike.items() if keys]


@contextmanager
def knocked_out(
    lalm: LALM,
    batch: PromptBatch,
    queries: str | Sequence[str] = "last",
    keys: str | Sequence[str] = "audio",
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    strength: float = 0.0,
    how: How = "mask",
) -> Iterator[LALM]:
    """A model in which queries of one batch do not read keys: its ``trace``, ``answer`` and ``generate`` run so.

        with knocked_out(lalm, batch, "last", "audio", layers=[3, 4, 5]) as edited:
            edited.answer(batch, labels, new_tokens=10)

    Args:
        lalm: stays as it is.
        batch: the only one that the edited model takes: the cut is of its positions.
        queries: who reads: a name or several; ``last`` and names that hold the last position go on with every token
            that the model writes (see the top of this room).
        keys: who is read.
        layers: blocks, from 0; all if None.
        heads: all if None.
        strength: factor on the attention weights; 0 cuts them off.
        how: see `Cut`; ``zero`` and ``spread`` need ``load(..., attn_implementation="eager")``. They change what
            attention gives after it has run: a trace reads the change from ``ln2.input`` on, not in ``attn.output``.

    Raises:
        CellError: unknown layers or heads, or attention that cannot be cut so; inside, another batch than this one.
        SpanError: a row without these positions.
    """
    layers = range(lalm.n_layers) if layers is None else layers
    chosen = None if heads is None else tuple(heads)
    by_row = [_union(batch, row, queries, keys) for row in range(len(batch))]
    for layer in layers:
        check_cut(lalm, Cut(layer, by_row[0][0], by_row[0][1], chosen, strength, how))
    edited = BatchTwin(lalm, weight_sharing_twin(lalm.module), batch)
    plain = {"heads": None if chosen is None else torch.tensor(chosen), "strength": strength, "how": how}
    with ExitStack() as hooks:
        for layer in layers:
            for handle in _hooks(edited, layer, by_row, batch.shape[1], plain):
                hooks.callback(handle.remove)
        try:
            yield edited
        finally:
            edited.over = True


def _union(
    batch: PromptBatch, row: int, queries: str | Sequence[str], keys: str | Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of a row that have any of the names, in order."""

    def positions(names: str | Sequence[str]) -> torch.Tensor:
        return torch.cat([positions_of(batch, row, name) for name in several(names)]).unique()

    return positions(queries), positions(keys)


def several(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, each once."""
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))


def _hooks(
    edited: LALM, layer: int, by_row: list[tuple[torch.Tensor, torch.Tensor]], length: int, plain: dict[str, Any]
) -> list[Any]:
    """Hooks on one layer's attention that cut each pass that goes through it."""
    attention = edited.blocks[layer].attn
    passing: dict[str, Any] = {}  # the cuts of the pass that goes through, and its own values

    def cuts_of(hidden: torch.Tensor, cache: Any) -> tuple[int, list[dict[str, Any]]]:
        first = 0 if cache is None else int(cache.get_seq_length(layer))
        copies = len(hidden) // len(by_row)  # beams
        rows = [by_row[row // copies] for row in range(len(hidden))]
        return first, [
            {"row": row, "queries": running - first, "keys": lost, **plain}
            for row, (queries, keys) in enumerate(rows)
            for running, lost in readings(_running(queries, length, first, first + hidden.shape[1]), keys)
        ]

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        first, cuts = cuts_of(hidden, kwargs.get("past_key_values"))
        passing["cuts"] = cuts
        if plain["how"] != "mask" or not cuts:
            return None
        rows = torch.arange(len(hidden), device=hidden.device)
        mask = ops.causal_mask(kwargs["attention_mask"], rows, first, first + hidden.shape[1])
        return args, {**kwargs, "attention_mask": ops.masked(mask, cuts, hidden.dtype, edited.n_heads)}

    def after(module: Any, args: Any, kwargs: Any, given: Any) -> Any:
        cache = kwargs.get("past_key_values")
        held = passing["values"] if cache is None else cache.layers[layer].values
        out = ops.reweighed(given[0], given[1], passing["cuts"], held, attention.o._module)
        return (out, *given[1:])

    def keep(module: Any, args: Any, given: torch.Tensor) -> None:
        passing["values"] = ops.heads(given, edited.d_head).transpose(1, 2)

    handles = [attention._module.register_forward_pre_hook(before, with_kwargs=True)]
    if plain["how"] != "mask":
        handles.append(attention.v._module.register_forward_hook(keep))
        handles.append(attention._module.register_forward_hook(after, with_kwargs=True))
    return handles


def _running(queries: torch.Tensor, length: int, first: int, past: int) -> torch.Tensor:
    """The queries among the columns that run; where the last of the prompt is one, so is all that was written."""
    if length - 1 in queries:
        queries = torch.cat([queries, torch.arange(length, max(past, length))])
    return queries[(queries >= first) & (queries < past)]

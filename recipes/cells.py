"""The engine's core: stored runs, and edited passes that go on from them.

A *run* is one forward pass of a labelled batch with everything kept that later passes can start from. A *cell* is one
edited pass over one row of a run: what a recipe asks for, one number of a heatmap. Cells say what is edited and where;
how little of the model must run for it is decided here:

1. A clip is encoded once, in the run.
2. A cell joins at the first layer that it edits, with the state that the run stored there. The layers below do not run.
3. Positions before the first one that it edits do not run: no later state reaches back to them. Their keys and values
   come from the run. An edit of the last token touches one position per layer.
4. Cells share passes as rows of one batch (a *wave*), whatever layer they join at. Cells that start at other positions
   share a wave where that costs less than reading the model's weights once more.
5. Only the last position meets the unembedding.

Two consequences that may surprise. The values of a `Write` are tensors: a recipe takes them from another run. And where
an edited state leads (which source, which scale) is decided before a wave runs, from states of stored runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from nnsight import save

from audio_lens_plugin import ops
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.recipes.engine import Desk
from audio_lens_plugin.recipes.scores import Scores

WRITABLE = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
PASS = 32
"""What a pass costs whatever its rows: reading a layer's weights, in positions that could run meanwhile (CPU)."""
SHORT_ROWS = 16
"""Rows of few positions that may stand for one row of a whole batch: each still needs its keys and values."""

How = Literal["mask", "zero", "spread"]


class CellError(ValueError):
    """An edit that the model, or its attention, cannot make."""


@dataclass(frozen=True, eq=False)
class Write:
    """An edit of activations in one row: ``state[cols, units] = keep * state[cols, units] + values``.

    Attributes:
        site: TransformerLens's name within a block, one of `WRITABLE`.
        layer: block, from 0.
        cols: positions in the row, counted with the padding.
        values: ``[n, d_model]``; of heads ``[n, units, d_head]``; of neurons ``[n, units]``.
        units: heads or neurons; None for all.
        keep: how much of the old value stays: 0 replaces it, 1 adds to it.
    """

    site: str
    layer: int
    cols: Int[torch.Tensor, " n"]
    values: Float[torch.Tensor, ...]
    units: tuple[int, ...] | None = None
    keep: float = 0.0

    def __post_init__(self) -> None:
        if self.site not in WRITABLE:
            raise CellError(f"{self.site!r} cannot be written; sites are: {', '.join(WRITABLE)}.")


@dataclass(frozen=True, eq=False)
class Cut:
    """An edit of attention in one row and layer: what some queries read from some keys.

    Attributes:
        layer: block, from 0.
        queries: positions that read.
        keys: positions that are read.
        heads: None for all.
        strength: factor on the attention weights; 0 cuts them off.
        how: ``mask``: before the softmax, so that the other keys take over. ``zero``: after it, nothing takes over.
            ``spread``: after it, the weight on the keys is divided evenly among them.
    """

    layer: int
    queries: Int[torch.Tensor, " queries"]
    keys: Int[torch.Tensor, " keys"]
    heads: tuple[int, ...] | None = None
    strength: float = 0.0
    how: How = "mask"

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise CellError(f"an attention strength is a factor of 0 or more, not {self.strength}.")
        if self.how not in get_args(How):
            raise CellError(f"there is no how={self.how!r}; there are: {', '.join(get_args(How))}.")


@dataclass(frozen=True, eq=False)
class Cell:
    """One edited pass.

    Attributes:
        row: row of the run.
        edits: what is changed in it, together.
        axes: what a table says of this cell: layer, position, ...
    """

    row: int
    edits: tuple[Write | Cut, ...]
    axes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass with everything kept.

    Attributes:
        batch: its prompts.
        states: what enters every block, then what leaves the last: ``[batch, pos, d_model]`` each.
        cache: keys and values of every block.
        frame: the keywords that the model gave its blocks.
        kept: further activations by (layer, site).
        tower: what enters every block of the audio tower, then what leaves the last, ``[clips, frames, d]`` each;
            empty unless asked for.
        log_probs: over the vocabulary, at each row's last position.
        scores: the same as labels, rank and divergence.
    """

    batch: PromptBatch
    states: list[Float[torch.Tensor, "batch pos d_model"]]
    cache: list[tuple[torch.Tensor, torch.Tensor]]
    frame: dict[str, Any]
    kept: dict[tuple[int, str], torch.Tensor]
    tower: list[torch.Tensor]
    log_probs: Float[torch.Tensor, "batch d_vocab"]
    scores: Scores

    def at(self, site: str, layer: int) -> Float[torch.Tensor, "batch pos ..."]:
        """The activations at a site, heads split."""
        if site == "hook_resid_pre":
            return self.states[layer]
        if site == "hook_resid_post":
            return self.states[layer + 1]
        return self.kept[layer, site]


def store(
    lalm: LALM,
    batch: PromptBatch,
    label_ids: Int[torch.Tensor, " labels"],
    *,
    sites: Iterable[tuple[int, str]] = (),
    tower: bool = False,
    writes: Mapping[int, Sequence[Write]] | None = None,
    reference: Float[torch.Tensor, "batch d_vocab"] | None = None,
) -> Run:
    """Run a batch once and keep what edited passes can go on from.

    Args:
        sites: (layer, name) of activations to keep beside the residual stream, which is always kept.
        tower: also keep the states of the audio tower.
        writes: edits of the run itself, by row.
        reference: log-probabilities that its scores are held against.

    Raises:
        CellError: an attention implementation that takes no mask of our making.
    """
    check_attention(lalm)
    wanted = [(layer, site) for layer, site in sites if site not in ("hook_resid_pre", "hook_resid_post")]
    edits = _by_layer((write.layer, plain(write, row)) for row, of_row in (writes or {}).items() for write in of_row)
    rows = torch.arange(len(batch))
    with torch.no_grad(), lalm.trace(batch, use_cache=True) as tracer:
        heard = save(ops.keep_tower(lalm.audio_encoder.blocks) if tower else [])
        states, cache, frame, kept = ops.keep_run(lalm.blocks, wanted, edits, lalm.d_head)
        scores = ops.last_scores(states[-1][:, -1], lalm.ln_final, lalm.unembed, label_ids, reference, rows)
        log_probs = ops.last_log_probs(states[-1][:, -1], lalm.ln_final, lalm.unembed)
        states, cache, frame, kept = save(states), save(cache), save(frame), save(kept)
        scores, log_probs = save(scores), save(log_probs)
        tracer.stop()
    return Run(batch, states, cache, frame, kept, heard, log_probs, Scores(*(part.cpu() for part in scores)))


def run_cells(
    lalm: LALM,
    run: Run,
    cells: Sequence[Cell],
    label_ids: Int[torch.Tensor, " labels"],
    *,
    reference: Float[torch.Tensor, "batch d_vocab"] | None = None,
    batch_size: int = 8,
    desk: Desk | None = None,
) -> Scores:
    """Run cells in as few and as small passes as they need.

    Args:
        reference: log-probabilities per row of the run that divergences are taken from; the run's own if None.
        batch_size: rows of whole length that a pass may hold; of short rows it holds more.
        desk: keeps the scores of finished waves, and is told of them.

    Returns:
        scores in the order of the cells.

    Raises:
        CellError: no cells; unknown layers; a cut that leaves a query nothing to read, or that needs the attention
            weights that ``sdpa`` does not give.
    """
    if not cells:
        raise CellError("there are no cells to run: name at least one layer and one position.")
    _check(lalm, run, cells)
    desk = desk or Desk()
    plans = [_place(cell, index, run, lalm.n_layers) for index, cell in enumerate(cells)]
    found: list[Scores] = []
    order: list[int] = []
    for wave in waves(plans, run.batch.shape[1], lalm.n_layers, batch_size):
        key = wave_key([cells[placed.index] for placed in wave])
        found.append(Scores(**desk.kept(key, partial(_scores_of, lalm, run, wave, label_ids, reference))))
        order += [placed.index for placed in wave]
        desk.advance(len(wave), len(cells))
    back = torch.tensor(order).argsort()
    return Scores(**{name: numbers[back] for name, numbers in vars(Scores.concat(found)).items()})


def counted_work(run: Run, cells: Sequence[Cell], n_layers: int) -> int:
    """Layer x position products that must run for these cells: from the first layer and position that each edits."""
    placed = [_place(cell, index, run, n_layers) for index, cell in enumerate(cells)]
    return sum((n_layers - one.layer) * (run.batch.shape[1] - one.col) for one in placed)


@dataclass(frozen=True, eq=False)
class Placed:
    """A cell and where it begins: its first layer, its first column, and its edits as the traced code takes them."""

    index: int
    row: int
    layer: int
    col: int
    writes: tuple[tuple[int, dict[str, Any]], ...]
    cuts: tuple[tuple[int, dict[str, Any]], ...]


def waves(placed: Sequence[Placed], length: int, n_layers: int, batch_size: int) -> list[list[Placed]]:
    """Cells that run together, those that join first standing first.

    Cells are taken by their first column, the shortest passes last; a column joins the passes before it where the
    positions that it runs in vain cost less than a pass of its own.

    Args:
        length: positions of the run.
    """
    groups: list[list[Placed]] = []
    by_col = sorted(placed, key=lambda one: (one.col, one.layer, one.index))
    for col in sorted({one.col for one in by_col}):
        members = [one for one in by_col if one.col == col]
        in_vain = sum(n_layers - one.layer for one in members) * (col - groups[-1][0].col) if groups else 0
        own_pass = PASS * max(n_layers - min(one.layer for one in members), 1)
        if groups and in_vain < own_pass:
            groups[-1] += members
        else:
            groups.append(members)
    found = []
    for group in groups:
        rows = max(1, min(batch_size * length // (length - group[0].col), batch_size * SHORT_ROWS))
        joined = sorted(group, key=lambda one: (one.layer, one.index))
        found += [joined[start : start + rows] for start in range(0, len(joined), rows)]
    return found


def wave_key(cells: Sequence[Cell]) -> str:
    """A name for the cells of a wave within their batch of samples."""
    described = [[cell.row, {name: str(value) for name, value in cell.axes.items()}] for cell in cells]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


def _place(cell: Cell, index: int, run: Run, n_layers: int) -> Placed:
    if not cell.edits:
        raise CellError(f"a cell without edits: {dict(cell.axes)}.")
    length = run.batch.shape[1]
    col = min(int((edit.cols if isinstance(edit, Write) else edit.queries).min()) for edit in cell.edits)
    writes, cuts = [], []
    for edit in cell.edits:
        if isinstance(edit, Cut):
            cuts.append((edit.layer, _plain_cut(edit, col)))
        elif edit.site == "hook_resid_post":  # what leaves a block enters the next: that block need not run
            writes.append((edit.layer + 1, {**plain(edit, 0, col), "site": "hook_resid_pre"}))
        else:
            writes.append((edit.layer, plain(edit, 0, col)))
    layer = min(layer for layer, _ in [*writes, *cuts])
    writes = [(at, _last_only(write, length - 1 - col) if at == n_layers else write) for at, write in writes]
    return Placed(index, cell.row, layer, col, tuple(writes), tuple(cuts))


def plain(write: Write, row: int, first_col: int = 0) -> dict[str, Any]:
    """A write as the traced code takes it."""
    units = None if write.units is None else torch.tensor(write.units)
    return {
        "site": write.site,
        "row": row,
        "cols": write.cols - first_col,
        "values": write.values,
        "units": units,
        "keep": write.keep,
    }


def _plain_cut(cut: Cut, first_col: int) -> dict[str, Any]:
    heads = None if cut.heads is None else torch.tensor(cut.heads)
    place = {"queries": cut.queries - first_col, "keys": cut.keys, "heads": heads}
    return {**place, "strength": cut.strength, "how": cut.how}


def _last_only(write: dict[str, Any], last: int) -> dict[str, Any]:
    """After the last block only the last position goes on."""
    chosen = write["cols"] == last
    values = write["values"][chosen.to(write["values"].device)]
    return {**write, "cols": torch.zeros(int(chosen.sum()), dtype=torch.long), "values": values}


def _scores_of(
    lalm: LALM, run: Run, wave: list[Placed], label_ids: torch.Tensor, reference: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    return vars(_halving(lalm, run, wave, label_ids, reference))


def _halving(
    lalm: LALM, run: Run, wave: list[Placed], label_ids: torch.Tensor, reference: torch.Tensor | None
) -> Scores:
    try:
        return _run_wave(lalm, run, wave, label_ids, reference)
    except torch.OutOfMemoryError:
        if len(wave) == 1:
            raise
    # Outside the except block: there the error would still hold the tensors of the failed pass.
    middle = len(wave) // 2
    return Scores.concat([_halving(lalm, run, half, label_ids, reference) for half in (wave[:middle], wave[middle:])])


def _run_wave(
    lalm: LALM, run: Run, wave: list[Placed], label_ids: torch.Tensor, reference: torch.Tensor | None
) -> Scores:
    first_col = min(one.col for one in wave)
    rows = torch.tensor([one.row for one in wave])
    described = {
        "rows": rows,
        "joined": [sum(one.layer <= layer for one in wave) for layer in range(lalm.n_layers + 1)],
        "first_col": first_col,
        "d_head": lalm.d_head,
        "n_heads": lalm.n_heads,
        "writes": _by_layer(
            (layer, _moved(write, "cols", row, one.col - first_col, layer == lalm.n_layers))
            for row, one in enumerate(wave)
            for layer, write in one.writes
        ),
        "cuts": _by_layer(
            (layer, _moved(cut, "queries", row, one.col - first_col, False))
            for row, one in enumerate(wave)
            for layer, cut in one.cuts
        ),
    }
    reference = run.log_probs if reference is None else reference
    carrier = {"inputs_embeds": run.states[0][:1, first_col:]}
    with torch.no_grad(), lalm.model.trace(**carrier, use_cache=True) as tracer:
        ends = ops.run_wave(lalm.blocks, run.states, run.cache, run.frame, described)
        scores = save(ops.last_scores(ends, lalm.ln_final, lalm.unembed, label_ids, reference, rows))
        tracer.stop()
    return Scores(*(part.cpu() for part in scores))


def _moved(edit: dict[str, Any], axis: str, row: int, shift: int, stays: bool) -> dict[str, Any]:
    """An edit in its row of the wave, its columns counted from the wave's first."""
    return {**edit, "row": row, axis: edit[axis] if stays else edit[axis] + shift}


def _by_layer(edits: Iterable[tuple[int, dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for layer, edit in edits:
        found.setdefault(layer, []).append(edit)
    return found


def _check(lalm: LALM, run: Run, cells: Sequence[Cell]) -> None:
    checked: set[tuple[Any, ...]] = set()
    for cell in cells:
        cuts = [edit for edit in cell.edits if isinstance(edit, Cut)]
        for edit in cell.edits:
            check_layers(lalm, [edit.layer])
        for cut in cuts:
            check_cut(lalm, cut)
            _check_z_is_left_alone(cell, cut)
            together = [other for other in cuts if other.layer == cut.layer and _share_heads(cut, other)]
            seen = (cell.row, *((id(one.queries), id(one.keys), one.strength) for one in together))
            if seen not in checked:
                _check_something_is_left(run, cell, together)
                checked.add(seen)


def check_layers(lalm: LALM, layers: Sequence[int]) -> None:
    """Refuse layers that the model does not have.

    Raises:
        CellError: it does not.
    """
    for layer in layers:
        if not 0 <= layer < lalm.n_layers:
            raise CellError(f"there is no layer {layer}: this model has layers 0 to {lalm.n_layers - 1}.")


def check_cut(lalm: LALM, cut: Cut) -> None:
    """Refuse a cut that no prompt of this model can have.

    Raises:
        CellError: an unknown layer or head, or attention weights that are not there to be changed.
    """
    check_layers(lalm, [cut.layer])
    check_attention(lalm)
    if unknown := sorted(set(cut.heads or ()) - set(range(lalm.n_heads))):
        raise CellError(f"there is no head {unknown[0]}: this model has heads 0 to {lalm.n_heads - 1}.")
    if cut.how != "mask" and lalm.attention != "eager":
        raise CellError(
            f"how={cut.how!r} changes attention weights, which {lalm.attention!r} attention does not give: "
            "load the model with attn_implementation='eager'."
        )


def check_attention(lalm: LALM) -> None:
    """Refuse attention that takes no mask of our making.

    Raises:
        CellError: another implementation than eager and sdpa.
    """
    if lalm.attention not in ("sdpa", "eager"):
        raise CellError(
            f"edited passes need attn_implementation='sdpa' or 'eager'; this model runs {lalm.attention!r}."
        )


def _check_z_is_left_alone(cell: Cell, cut: Cut) -> None:
    written = any(
        isinstance(edit, Write) and (edit.layer, edit.site) == (cut.layer, "attn.hook_z") for edit in cell.edits
    )
    if cut.how != "mask" and written:
        raise CellError(f"layer {cut.layer}: how={cut.how!r} computes z anew, which would undo the write to it.")


def _share_heads(cut: Cut, other: Cut) -> bool:
    return cut.heads is None or other.heads is None or bool(set(cut.heads) & set(other.heads))


def _check_something_is_left(run: Run, cell: Cell, cuts: Sequence[Cut]) -> None:
    """A query that may read nothing has no attention: some implementations give 0, others an average of everything."""
    length = run.batch.shape[1]
    real = run.batch.inputs["attention_mask"][cell.row].bool()
    readable = torch.ones(length, length, dtype=torch.bool).tril() & real
    for cut in cuts:
        if cut.how == "mask" and cut.strength == 0:
            readable[cut.queries[:, None], cut.keys] = False
    for cut in cuts:
        blind = cut.queries[~readable[cut.queries].any(-1)]
        if cut.how == "mask" and len(blind):
            token = run.batch.positions.token_text(cell.row, int(blind[0]))
            raise CellError(
                f"{dict(cell.axes)}: every key of the query at position {int(blind[0])} ({token!r}) would be blocked, "
                "which leaves it no attention. Block fewer keys, or use how='zero'."
            )

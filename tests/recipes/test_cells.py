"""The engine against the naive loop, cell by cell."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, open_model
from naive import naive

from audio_lens_plugin.datasets import toy_clips
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.recipes.activation_patching import activation_patching
from audio_lens_plugin.recipes.cells import WRITABLE, Cell, CellError, Cut, Run, Write, counted_work, run_cells, store
from audio_lens_plugin.recipes.pairs import pairs_from
from audio_lens_plugin.tracks import TRACKS

TOLERANCE = 1e-5
IDS = torch.tensor([5, 50, 500])


@pytest.fixture(scope="module", params=MODELS)
def lalm(request: pytest.FixtureRequest) -> LALM:
    return open_model(request.param)


@pytest.fixture(scope="module")
def run(lalm: LALM, clips: list) -> Run:
    batch = lalm.prompt(clips[:2], question=["What is heard?", "What is heard in this clip?"], answer="It is a")
    sites = [(layer, site) for layer in range(lalm.n_layers) for site in WRITABLE]
    return store(lalm, batch, IDS, sites=sites)


def agree(lalm: LALM, run: Run, cells: list[Cell], **kwargs) -> torch.Tensor:
    """The engine's scores equal the naive loop's logits; returns the latter."""
    wanted = naive(lalm, run.batch, cells)
    found = run_cells(lalm, run, cells, IDS, **kwargs)
    torch.testing.assert_close(found.label_logits, wanted[:, IDS], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found.log_partition, wanted.logsumexp(-1), atol=TOLERANCE, rtol=TOLERANCE)
    ranks = (wanted[:, None] > wanted[:, IDS, None]).sum(-1)
    assert (found.ranks - ranks).abs().max() <= 1  # neighbours may swap by rounding
    reference = naive(lalm, run.batch, [Cell(cell.row, ()) for cell in cells]).log_softmax(-1)
    divergence = (reference.exp() * (reference - wanted.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found.kl, divergence, atol=TOLERANCE, rtol=1e-4)
    return wanted


def spans(run: Run, row: int) -> dict[str, torch.Tensor]:
    return {name: run.batch.at(name).row(row) for name in ("audio", "question", "last")}


@pytest.mark.parametrize("site", WRITABLE)
def test_a_write_at_every_site_equals_the_naive_loop(lalm: LALM, run: Run, site: str) -> None:
    cells = []
    for row in (0, 1):
        for name, cols in spans(run, row).items():
            for layer in {0, lalm.n_layers // 2, lalm.n_layers - 1}:
                other = run.at(site, layer)[1 - row, -len(cols) :]  # anything else than what is there
                cells.append(Cell(row, (Write(site, layer, cols, other.clone()),), {"layer": layer, "at": name}))
    wanted = agree(lalm, run, cells)
    plain = naive(lalm, run.batch, [Cell(cell.row, ()) for cell in cells])
    assert ((wanted - plain).abs().max(-1).values > 1e-6).float().mean() > 0.4  # most of the edits change something


@pytest.mark.parametrize("site", WRITABLE)
def test_a_self_patch_changes_nothing(lalm: LALM, run: Run, site: str) -> None:
    cells = [
        Cell(row, (Write(site, layer, cols, run.at(site, layer)[row, cols]),), {"layer": layer, "at": name})
        for row in (0, 1)
        for name, cols in spans(run, row).items()
        for layer in range(lalm.n_layers)
    ]
    found = run_cells(lalm, run, cells, IDS)
    rows = torch.tensor([cell.row for cell in cells])
    torch.testing.assert_close(found.label_logits, run.scores.label_logits[rows], atol=TOLERANCE, rtol=TOLERANCE)
    assert found.kl.abs().max() < TOLERANCE


@pytest.mark.parametrize("site", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_post"])
def test_single_heads_and_neurons(lalm: LALM, run: Run, site: str) -> None:
    units, cells = (0, 1), []
    for row in (0, 1):
        for cols in spans(run, row).values():
            values = torch.randn(run.at(site, 1)[row, cols][:, list(units)].shape)
            cells.append(Cell(row, (Write(site, 1, cols, values, units, keep=0.5),), {"cols": str(cols)}))
    agree(lalm, run, cells)


def test_several_edits_in_one_cell(lalm: LALM, run: Run) -> None:
    spoken = spans(run, 0)
    add = torch.randn(len(spoken["last"]), run.states[0].shape[-1])
    edits = (
        Write("hook_resid_post", 0, spoken["last"], add, keep=1.0),
        Write("hook_mlp_out", 1, spoken["question"], run.at("hook_mlp_out", 1)[1, spoken["question"]]),
        Cut(lalm.n_layers - 1, spoken["last"], spoken["audio"]),
    )
    asked = spoken["question"]
    more = add.expand(len(asked), -1)
    ends = tuple(Write("hook_resid_post", layer, asked, more, keep=1.0) for layer in (0, lalm.n_layers - 1))
    agree(lalm, run, [Cell(0, edits, {"n": 0}), Cell(1, edits[:1], {"n": 1}), Cell(0, ends, {"n": 2})])


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("heads", [None, (1,)])
def test_a_cut_equals_the_naive_loop(lalm: LALM, run: Run, heads: tuple | None, strength: float) -> None:
    cells = []
    for row in (0, 1):
        spoken = spans(run, row)
        for queries in ("question", "last"):
            for layer in (0, lalm.n_layers - 1):
                cuts = [
                    Cut(at, spoken[queries], spoken["audio"], heads, strength)
                    for at in range(layer, min(layer + 2, lalm.n_layers))
                ]
                cells.append(Cell(row, tuple(cuts), {"layer": layer, "queries": queries}))
    agree(lalm, run, cells)


def test_batches_of_any_size_give_the_same(lalm: LALM, run: Run) -> None:
    cols = spans(run, 1)["audio"]
    values = run.states[0][0, -len(cols) :]
    cells = [Cell(1, (Write("hook_resid_pre", layer, cols, values),), {"l": layer}) for layer in range(lalm.n_layers)]
    one, many = (run_cells(lalm, run, cells, IDS, batch_size=size) for size in (1, 32))
    torch.testing.assert_close(one.label_logits, many.label_logits, atol=TOLERANCE, rtol=TOLERANCE)


def what_ran(lalm: LALM, run: Run, cells: list[Cell], **kwargs) -> list[tuple[int, int, int]]:
    """Layer, rows and positions of every block that ran, seen by torch hooks inside the blocks."""
    seen: list[tuple[int, int, int]] = []
    handles = [
        block.attn.q._module.register_forward_hook(
            lambda module, args, out, layer=layer: seen.append((layer, *out.shape[:2]))
        )
        for layer, block in enumerate(lalm.blocks)
    ]
    try:
        run_cells(lalm, run, cells, IDS, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_no_layer_and_no_position_runs_in_vain(lalm: LALM, run: Run) -> None:
    last, length = spans(run, 1)["last"], run.batch.shape[1]
    top = lalm.n_layers - 1
    value = run.states[top][0, last]
    one = what_ran(lalm, run, [Cell(1, (Write("hook_resid_pre", top, last, value),))])
    assert one == [(top, 1, 1)]
    sweep = [Cell(1, (Write("hook_resid_pre", layer, last, value),), {"l": layer}) for layer in range(lalm.n_layers)]
    assert what_ran(lalm, run, sweep) == [(layer, layer + 1, 1) for layer in range(lalm.n_layers)]
    assert counted_work(run, sweep, lalm.n_layers) == sum(rows for _, rows, _ in what_ran(lalm, run, sweep))
    after = Cell(1, (Write("hook_resid_post", top, last, value),))
    assert what_ran(lalm, run, [after]) == []  # what leaves the last block needs no block
    heard = spans(run, 1)["audio"]
    whole = [Cell(1, (Write("hook_resid_pre", 0, heard, run.states[0][0, -len(heard) :]),))]
    assert {positions for *_, positions in what_ran(lalm, run, whole)} == {length - int(heard[0])}


def test_waves_hold_no_more_rows_than_asked_for(toy: LALM, clips: list) -> None:
    run = store(toy, toy.prompt(clips[0], question="What is heard?"), IDS)
    cols, length = run.batch.at("all").row(0), run.batch.shape[1]
    write = [Write("hook_resid_pre", layer, cols, run.states[layer][0, cols]) for layer in range(toy.n_layers)]
    cells = [Cell(0, (write[layer],), {"n": number}) for layer in range(toy.n_layers) for number in range(3)]
    ran = what_ran(toy, run, cells, batch_size=2)
    assert max(rows for _, rows, _ in ran) == 2
    assert {positions for *_, positions in ran} == {length}


def test_what_cannot_be_edited_is_refused(toy: LALM, clips: list) -> None:
    run = store(toy, toy.prompt(clips[0], question="What is heard?"), IDS)
    last, everything = run.batch.at("last").row(0), run.batch.at("all").row(0)
    with pytest.raises(CellError, match="'hook_nothing' cannot be written"):
        Write("hook_nothing", 0, last, run.states[0][0, last])
    with pytest.raises(CellError, match="no layer 99"):
        run_cells(toy, run, [Cell(0, (Write("hook_resid_pre", 99, last, run.states[0][0, last]),))], IDS)
    with pytest.raises(CellError, match="every key of the query"):
        run_cells(toy, run, [Cell(0, (Cut(0, last, everything),))], IDS)
    halves = [Cut(0, last, half) for half in everything.chunk(2)]
    with pytest.raises(CellError, match="every key of the query"):
        run_cells(toy, run, [Cell(0, tuple(halves))], IDS)
    with pytest.raises(CellError, match="no cells to run"):
        run_cells(toy, run, [], IDS)
    with pytest.raises(CellError, match="without edits"):
        run_cells(toy, run, [Cell(0, ())], IDS)
    with pytest.raises(CellError, match="attn_implementation='eager'"):
        run_cells(toy, run, [Cell(0, (Cut(0, last, everything, how="zero"),))], IDS)


def test_a_clip_is_encoded_once_whatever_the_number_of_cells(toy: LALM) -> None:
    pairs = pairs_from(toy_clips("toy/qwen2-audio", "Animal").samples("open+is+question"), "silence", limit=2)
    clips_heard: list[int] = []
    handle = toy.audio_encoder._module.register_forward_hook(
        lambda module, args, kwargs, out: clips_heard.append(len(out.last_hidden_state)), with_kwargs=True
    )
    try:
        result = activation_patching(toy, pairs, TRACKS["Animal"].labels)
    finally:
        handle.remove()
    assert len(result.cells) == 2 * 5 * toy.n_layers
    assert clips_heard == [2, 2]  # two clean clips, two silences

"""The benchmark of causal sweeps: counted work, sampling, ratios, verdicts, slow arms (benchmarks/sweeps.py)."""

from __future__ import annotations

import pytest
import sweeps
import torch

SECONDS = {
    **{"plain": 2.0, "blocks": 1.0, "engine": 10.0, "hooks": 100.0, "TransformerLens": 120.0},
    **{"knockout engine": 2.0, "knockout hooks": 40.0},
}
MEMORY = {"rest": 1000.0, "engine": 1150.0, "plain": 1100.0}


def test_counted_work_is_what_lies_above_and_after_a_cell() -> None:
    first = {"audio": 2, "last": 9}
    assert sweeps.counted([(0, "audio")], first, layers=4, length=10) == 4 * 8
    assert sweeps.counted([(3, "last")], first, layers=4, length=10) == 1
    assert sweeps.counted([(1, "audio"), (2, "last")], first, layers=4, length=10) == 3 * 8 + 2


def test_a_sample_takes_every_role_of_its_layers() -> None:
    cells = [(layer, role) for layer in range(6) for role in ("audio", "last")]
    assert sweeps.sampled(cells, 4) == [(0, "audio"), (0, "last"), (4, "audio"), (4, "last")]
    assert sweeps.sampled(cells, 1) == cells


def test_windows_end_at_the_edges() -> None:
    assert [list(sweeps.window(centre, 4)) for centre in range(4)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]


def test_ratios_of_a_round() -> None:
    found = sweeps.ratios(SECONDS, passes=4.0)
    assert found["hooks / engine"] == 10
    assert found["TransformerLens / engine"] == 12
    assert found["engine / counted"] == 10 / (4 * 2)
    assert found["engine / strictly"] == 10 / ((4 + 2) * 1)
    assert found["knockout hooks / engine"] == 20


def test_a_nan_is_no_agreement() -> None:
    values = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 4.0])}
    assert sweeps.largest_difference(values, {**values, 1: torch.tensor([3.0, 4.5]), 2: torch.zeros(2)}) == 0.5
    assert sweeps.largest_difference(values, {**values, 0: torch.tensor([torch.nan, 2.0])}) == torch.inf


@pytest.mark.parametrize(
    ("arm", "seconds", "missed"),
    [
        ("engine", 10.0, []),
        ("hooks", 79.0, ["engine at least 8 x faster than hooks"]),
        ("TransformerLens", 79.0, ["engine at least 8 x faster than TransformerLens"]),
        ("plain", 1.9, ["engine at most 1.25 x the counted work"]),
        ("knockout hooks", 29.0, ["knockout at least 15 x faster than hooks"]),
    ],
)
def test_a_missed_target_is_told(arm: str, seconds: float, missed: list[str]) -> None:
    one = sweeps.ratios({**SECONDS, arm: seconds}, passes=4.0)
    figures = {"ratios": {name: [value] for name, value in one.items()}, "memory": None}
    assert [target for target, reached in sweeps.verdicts(figures) if not reached] == missed


def test_memory_is_judged_beyond_the_weights() -> None:
    ratios = {name: [value] for name, value in sweeps.ratios(SECONDS, passes=4.0).items()}
    assert all(reached for _, reached in sweeps.verdicts({"ratios": ratios, "memory": MEMORY}))
    more = {**MEMORY, "engine": 1160.0}  # 1.05 times the peak, 1.6 times what the pass itself takes
    assert not sweeps.verdicts({"ratios": ratios, "memory": more})[-1][1]


@pytest.mark.parametrize(("name", "filled"), [("layers.0.input_layernorm.weight", 1.0), ("q_proj.bias", 0.0)])
def test_vectors_are_filled_as_usual(name: str, filled: float) -> None:
    weight = torch.full((3,), torch.nan)
    sweeps.fill(name, weight)
    assert weight.tolist() == [filled] * 3


@pytest.fixture(scope="module")
def sweep() -> sweeps.Sweep:
    return sweeps.Sweep(sweeps.toy("cpu"))


def test_the_slow_arms_agree_and_change_something(sweep: sweeps.Sweep) -> None:
    cells = [(0, "audio"), (3, "question"), (6, "last")]
    hooked, start = {cell: sweep.hooked(cell) for cell in cells}, sweep.plain()
    assert sweeps.largest_difference(hooked, sweep.through_lens(cells)) < 1e-5
    assert all(float((value - start).abs().max()) > 1e-2 for value in hooked.values())


def test_the_audio_at_layer_0_is_the_whole_difference(sweep: sweeps.Sweep) -> None:
    clean = sweep.twin(**sweep.lalm.inputs(sweep.clean)).logits[0, -1, sweep.ids]
    torch.testing.assert_close(sweep.hooked((0, "audio")), clean.detach(), atol=1e-5, rtol=1e-5)


def test_a_hook_per_layer_knocks_out_and_leaves_nothing_behind(sweep: sweeps.Sweep) -> None:
    start = sweep.plain()
    assert float((sweep.knocked_out(5) - start).abs().max()) > 1e-2
    torch.testing.assert_close(sweep.plain(), start, atol=0, rtol=0)


def test_a_trace_reads_what_hooks_read(sweep: sweeps.Sweep) -> None:
    hooked, traced = sweep.hooked_reads(), sweep.traced_reads()
    assert len(traced) == sweeps.READS
    assert sweeps.largest_difference(dict(enumerate(hooked)), dict(enumerate(traced))) == 0

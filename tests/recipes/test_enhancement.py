"""Enhancement against passes made by hand with plain torch hooks; splits that do not leak; numbers counted by hand."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError
from nnsight import save

import audio_lens_plugin as alp
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes import enhancement
from audio_lens_plugin.recipes.cells import CellError
from audio_lens_plugin.recipes.enhancement import (
    Enhancement,
    EnhanceResult,
    enhance,
    enhance_grid,
    enhance_sweep,
    enhance_tracks,
    enhanced,
    held_out_table,
    judged,
    split,
    split_groups,
)
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.recipes.scores import Scores
from audio_lens_plugin.results import Header, ResultError
from audio_lens_plugin.spans import SpanError
from audio_lens_plugin.statistics import holm

TOLERANCE = 1e-5
WORDS = ("dog", "cat", "cow")
SETTINGS = [
    Enhancement(2, 5),
    Enhancement(0, 7, 0.5, "audio"),
    Enhancement(3, 4, 2.0, "attribute", "average"),
    Enhancement(1, 6, 1.5, "audio", "matched"),
    Enhancement(6, 2),
    Enhancement(7, 0, -0.5, "attribute"),
    Enhancement(5, 1, 1.0, "audio", "average"),
    Enhancement(4, 3, 1.0, "last", "matched"),
    Enhancement(3, (5, 1, 7), 0.7, "audio"),
    Enhancement(2, (4, 6), 0.7, "last", "matched"),
]
GENERATION = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.fixture(scope="module", params=alp.loading.toys())
def lalm(request: pytest.FixtureRequest) -> LALM:
    return alp.load(request.param)


def batch_of(lalm: LALM, clips: list) -> PromptBatch:
    """Two rows of different length, also where every clip takes as many positions."""
    questions = ["What animal is it?", "What animal is it in this sound file?"]
    batch = lalm.prompt(clips[:2], question=questions, answer="The animal is", attribute="animal")
    assert (batch.inputs["attention_mask"] == 0).any()  # a row is padded on the left
    return batch


def by_hand(lalm: LALM, batch: PromptBatch, setting: Enhancement, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of whole passes with torch hooks: one pass where the source is below its only target, else two.

    ``ids``: the prompt and what was written after it; the edit stays at the prompt's positions.
    """
    twin = weight_sharing_twin(lalm.module)
    blocks, inputs, length = twin.get_decoder().layers, lalm.inputs(batch), batch.shape[1]
    if ids is not None:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - length), value=1)
        inputs |= {"input_ids": ids, "attention_mask": mask}
    places = list(zip(batch.at(setting.position).rows, batch.at(setting.position).cols, strict=True))
    seen: dict[int, torch.Tensor] = {}
    targets = (setting.target,) if isinstance(setting.target, int) else setting.target

    def keep(layer: int) -> Any:
        return blocks[layer].register_forward_hook(lambda module, args, out: seen.setdefault(layer, out.clone()) * 1)

    def edit(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        layer, out = next(place for place, block in enumerate(blocks) if block is module), out.clone()
        for row, col in places:
            old, new = out[row, col].clone(), seen[setting.source][row, col]
            if setting.how == "average":
                out[row, col] = (old + setting.coefficient * new) / (1 + setting.coefficient)
                continue
            if setting.how == "matched":
                new = new / new.norm() * seen.get(layer, out)[row, col].norm()
            out[row, col] = old + setting.coefficient * new
        return out

    with torch.no_grad(), ExitStack() as hooks:
        if len(targets) > 1 or setting.source > targets[0]:
            kept = [keep(layer) for layer in {setting.source, *targets}]
            twin(**inputs, use_cache=False)
            for handle in kept:
                handle.remove()
        else:
            hooks.callback(keep(setting.source).remove)
        for layer in targets:
            hooks.callback(blocks[layer].register_forward_hook(edit).remove)
        return twin(**inputs, use_cache=False).logits


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_enhancement_equals_passes_by_hand(lalm: LALM, clips: list, setting: Enhancement) -> None:
    batch, labels = batch_of(lalm, clips), lalm.labels(WORDS)
    wanted = by_hand(lalm, batch, setting)[:, -1].log_softmax(-1)[:, labels.first]
    torch.testing.assert_close(enhance(lalm, batch, WORDS, setting).log_probs, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    with enhanced(lalm, batch, setting) as edited:
        answers = edited.answer(batch, WORDS)
        with torch.no_grad(), edited.trace(batch) as tracer:
            seen = save(edited.unembed.output[:, -1].log_softmax(-1)[:, labels.first])
            tracer.stop()
    torch.testing.assert_close(answers.log_probs, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(seen, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    if (setting.source, setting.target) != (0, 7):  # after the last block only the last position is read
        assert (wanted - lalm.answer(batch, WORDS).log_probs).abs().max() > 1e-4


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[5], SETTINGS[8]], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_written_tokens_are_not_edited(lalm: LALM, clips: list, setting: Enhancement, use_cache: bool) -> None:
    batch, told = batch_of(lalm, clips), dict(output_logits=True, return_dict_in_generate=True, use_cache=use_cache)
    with enhanced(lalm, batch, setting) as edited:
        made = edited.generate(batch, **GENERATION, **told)
    wanted = by_hand(lalm, batch, setting, made.sequences)[:, batch.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    plain = lalm.generate(batch, **GENERATION, **told)
    assert (plain.logits[0] - made.logits[0]).abs().max() > 1e-3


def test_beams_and_whole_labels_are_enhanced(toy: LALM, clips: list) -> None:
    batch, setting = batch_of(toy, clips), Enhancement(2, 5, 3.0)
    with enhanced(toy, batch, setting) as edited:
        whole = edited.answer(batch, WORDS, whole=True)
        beams = edited.generate(batch, **GENERATION, num_beams=3, num_return_sequences=3)
        first = edited.generate(batch, max_new_tokens=1, num_beams=3, num_return_sequences=3, do_sample=False)
    one_token = [index for index, tokens in enumerate(whole.labels.tokens) if len(tokens) == 1]
    assert one_token
    wanted = by_hand(toy, batch, setting)[:, -1].log_softmax(-1)
    ids = whole.labels.first[one_token]
    torch.testing.assert_close(whole.log_probs[:, one_token], wanted[:, ids], atol=TOLERANCE, rtol=TOLERANCE)
    assert len(beams) == 6
    assert torch.equal(first[:, -1].view(2, 3), wanted.topk(3).indices)


def test_a_trace_reads_what_is_edited_and_may_stop_before(toy: LALM, clips: list) -> None:
    batch, setting = batch_of(toy, clips), Enhancement(2, 5)
    with torch.no_grad(), toy.trace(batch) as tracer:
        source, target = save(toy.blocks[2].output[:, -1]), save(toy.blocks[5].output[:, -1])
        tracer.stop()
    with enhanced(toy, batch, setting) as edited, torch.no_grad():
        with edited.trace(batch) as tracer:
            early = save(edited.blocks[1].output)
            tracer.stop()
        with edited.trace(batch) as tracer:
            found = save(edited.blocks[5].output[:, -1])
            tracer.stop()
    assert early.shape[:2] == batch.shape
    torch.testing.assert_close(found, source + target, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_model_itself_is_never_touched(toy: LALM, clips: list) -> None:
    batch = batch_of(toy, clips)
    plain, setting = toy.answer(batch, WORDS).log_probs, Enhancement(2, 5)
    with enhanced(toy, batch, setting) as edited:
        assert torch.equal(toy.answer(batch, WORDS).log_probs, plain)
    assert torch.equal(toy.answer(batch, WORDS).log_probs, plain)
    with pytest.raises(CellError, match="has ended"):
        edited.answer(batch, WORDS)
    louder = [replace(clip, waveform=2 * clip.waveform) for clip in clips]  # the same ids, another sound
    with enhanced(toy, batch, setting) as edited, pytest.raises(CellError, match="another batch"):
        edited.answer(batch_of(toy, louder), WORDS)


def test_impossible_settings_are_refused(toy: LALM, clips: list) -> None:
    for target in (3, (1, 3)):
        with pytest.raises(CellError, match="layer 3 is source and target"):
            Enhancement(3, target)
    for target in ((), (1, 1)):
        with pytest.raises(CellError, match="one layer, or several different ones"):
            Enhancement(3, target)
    with pytest.raises((CellError, TypeCheckError), match="median"):
        Enhancement(1, 2, how="median")
    for coefficient, how in ((float("nan"), "add"), (-1.0, "average")):
        with pytest.raises(CellError, match="coefficient"):
            Enhancement(1, 2, coefficient, how=how)
    batch = batch_of(toy, clips)
    for setting in (Enhancement(8, 2), Enhancement(2, (3, -1))):
        with pytest.raises(CellError, match="layers 0 to 7"):
            enhance(toy, batch, WORDS, setting)
        with pytest.raises(CellError, match="layers 0 to 7"):
            enhanced(toy, batch, setting)
    mixed = toy.prompt([clips[0], None], question="What animal?", answer="It is")
    with pytest.raises(SpanError, match=r"row 1 \(no clip\) is 'audio'"):
        enhance(toy, mixed, WORDS, Enhancement(1, 2, position="audio"))


# The sweep.


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(alp.toy_clips("toy/qwen2-audio", "Emotion").samples("open+is"))


def sweep(toy: LALM, samples: Any, **settings: Any) -> EnhanceResult:
    settings = dict(sources=[1, 5], targets=[1, 3, 6], coefficients=[1.0, 2.0], **settings)
    return enhance_sweep(toy, samples, alp.TRACKS["Emotion"].labels, **settings)


def test_every_cell_of_a_sweep_equals_passes_by_hand(toy: LALM, samples: list) -> None:
    found = sweep(toy, samples, positions=["last", "audio"], batch_size=3)
    by_name = {sample.name: sample for sample in samples}
    ids = toy.labels(found.labels).first
    development = found.cells[(found.samples["split"] == "development").to_numpy()[found.cells["sample"]]]
    assert len(development) == (found.samples["split"] == "development").sum() * 2 * 5 * 2  # 1 -> 1 is no setting
    for place, cell in pd.concat([found.cells[::17], found.cells.tail(4)]).iterrows():
        batch = toy.batch([by_name[found.samples["sample"][cell["sample"]]].prompt])
        setting = Enhancement(cell["source"], cell["target"], cell["coefficient"], cell["position"])
        wanted = by_hand(toy, batch, setting)[0, -1].log_softmax(-1)[ids]
        torch.testing.assert_close(found.scores.log_probs[place], wanted, atol=TOLERANCE, rtol=TOLERANCE)
    clean = toy.answer(toy.batch([by_name[found.samples["sample"][0]].prompt]), found.labels).log_probs[0]
    torch.testing.assert_close(found.baselines["clean"].log_probs[0], clean, atol=TOLERANCE, rtol=TOLERANCE)


def test_held_out_clips_have_the_chosen_setting_alone(toy: LALM, samples: list) -> None:
    found = sweep(toy, samples)
    held = (found.samples["split"] == "held-out").to_numpy()
    cells = found.cells[held[found.cells["sample"]]]
    assert cells["sample"].tolist() == np.flatnonzero(held).tolist()
    assert {tuple(line) for line in cells[enhancement.SETTING].to_numpy()} == {
        (found.chosen.position, found.chosen.source, found.chosen.target, found.chosen.coefficient)
    }
    table = found.development()
    best = table.sort_values(["accuracy", "log_prob"], ascending=False).iloc[0]
    assert (best["source"], best["target"], best["coefficient"]) == (
        found.chosen.source,
        found.chosen.target,
        found.chosen.coefficient,
    )


def test_held_out_clips_do_not_enter_the_choice(toy: LALM, samples: list) -> None:
    """Their sounds are replaced: the choice and all it was made by stay, and only their own numbers change."""
    for choose_by in ("accuracy", "information"):
        found = sweep(toy, samples, choose_by=choose_by)
        held = set(split(samples, 0.5, 0)[1])
        poisoned = [sample.silenced() if place in held else sample for place, sample in enumerate(samples)]
        poisoned = [_retuned(sample, place) if place in held else sample for place, sample in enumerate(poisoned)]
        again = sweep(toy, poisoned, choose_by=choose_by)
        assert again.header.options == found.header.options
        assert again.samples.equals(found.samples)
        pd.testing.assert_frame_equal(again.development(), found.development())
        assert not np.array_equal(again.metric("log_prob"), found.metric("log_prob"))


def _retuned(sample: Sample, place: int) -> Sample:
    """A sound of its own, so that no two clips are the same."""
    (clip,) = sample.prompt.clips
    noise = 0.1 * np.random.default_rng(place).standard_normal(len(clip.waveform)).astype(np.float32)
    return replace(sample, prompt=replace(sample.prompt, clips=(replace(clip, waveform=noise),)))


def test_the_information_score_chooses_the_source(toy: LALM, samples: list) -> None:
    found = sweep(toy, samples, choose_by="information", positions=["last", "audio"])
    development = [samples[place] for place in split(samples, 0.5, 0)[0]]
    scores = logit_lens(toy, development, found.labels, ["last", "audio"]).information()
    for position in ("last", "audio"):
        of_position = scores[scores["span"] == position]["score"].to_numpy()[1:]
        best = 1 if of_position[1] >= of_position[5] else 5
        assert found.header.options["sources"][position] == [best]
        tried = found.development()
        assert set(tried[tried["position"] == position]["source"]) == {best}


def named(label: str, place: int, loudness: float | None = None) -> Sample:
    sound = np.full(100, place / 1000 if loudness is None else loudness, dtype=np.float32)
    return Sample(f"{label}{place}", alp.Prompt(clips=(alp.Clip(sound, 16_000),), answer="It is"), label)


def test_a_split_is_drawn_within_labels() -> None:
    samples = [named(label, place) for place in range(60) for label in ("dog", "cat")]
    samples = [replace(sample, prompt=named("", index).prompt) for index, sample in enumerate(samples)]
    for share in (0.1, 0.25, 0.5, 0.9):
        development, held_out = split(samples, share, 0)
        assert sorted(development + held_out) == list(range(120))
        assert len(development) == int(120 * share)
        dogs = sum(samples[place].label == "dog" for place in development)
        assert abs(dogs - 60 * share) <= 1
    assert split(samples, 0.5, 1) == split(samples, 0.5, 1) != split(samples, 0.5, 2)


def test_a_clip_is_on_one_side_whatever_is_asked_and_said_of_it() -> None:
    samples = [named("dog", place, loudness=(place % 6) / 10) for place in range(24)]
    spoken = [replace(s.prompt.clips[0], transcript="woof" if i % 2 else None) for i, s in enumerate(samples)]
    samples = [replace(s, prompt=replace(s.prompt, clips=(clip,))) for s, clip in zip(samples, spoken, strict=True)]
    development, held_out = split(samples, 0.5, 0)
    assert len(development) == len(held_out) == 12
    assert {place % 6 for place in development} & {place % 6 for place in held_out} == set()


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_an_empty_split_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="leave one side of the split empty"):
        split([named("dog", place) for place in range(10)], share, 0)


def hand_made() -> EnhanceResult:
    """Four development clips with two settings each, six held-out clips with the second of them."""
    header = Header("enhancement", "model", None, "weights", "float32", "sdpa", "custom", ("dog", "cat"))
    header = replace(header, options={"chosen": vars(Enhancement(1, 2))})
    samples = pd.DataFrame(
        {
            "sample": [f"s{place}" for place in range(10)],
            "truth": ["dog"] * 10,
            "split": ["development"] * 4 + ["held-out"] * 6,
        }
    )
    right_clean = [1, 0, 0, 0, *[1, 1, 0, 0, 0, 0]]
    cells = [(place, 0, 2, right) for place, right in enumerate([1, 1, 0, 1])]
    cells += [(place, 1, 2, right) for place, right in enumerate([1, 1, 1, 0])]
    cells += [(place + 4, 1, 2, right) for place, right in enumerate([1, 0, 1, 1, 1, 0])]

    def scores(right: list[int], margin: float = 1.0) -> Scores:
        logits = torch.tensor([[margin, 0.0] if one else [0.0, margin] for one in right])
        count = len(right)
        return Scores(logits, logits.logsumexp(-1), torch.zeros(count, 2).long(), torch.zeros(count))

    table = pd.DataFrame([line[:3] for line in cells], columns=["sample", "source", "target"])
    table = table.assign(position="last", coefficient=1.0)
    return EnhanceResult(header, samples, table, scores([line[3] for line in cells]), {"clean": scores(right_clean)})


def test_tables_are_counted_by_hand() -> None:
    found = hand_made()
    table = found.development()
    assert table["source"].tolist() == [0, 1]
    assert table["accuracy"].tolist() == [0.75, 0.75]
    assert table["change"].tolist() == [0.5, 0.5]
    assert table["samples"].tolist() == [4, 4]
    line = found.held_out().iloc[0]
    assert (line["samples"], line["chance"]) == (6, 0.5)
    assert (line["before"], line["after"], line["gain"]) == pytest.approx((2 / 6, 4 / 6, 2 / 6))
    assert (line["gained"], line["lost"]) == (3, 1)
    assert line["p"] == pytest.approx(2 * (1 + 4) / 16)  # at most one of four the other way, two-sided
    assert line["gain_low"] < 0 < line["gain"] < line["gain_high"]
    assert "layer 1 -> 2" in repr(found)
    assert "accuracy 0.333 -> 0.667" in repr(found)


def test_equal_accuracy_is_decided_by_the_truths_probability() -> None:
    table = pd.DataFrame(
        {
            "position": "last",
            "source": [0, 1, 2, 3],
            "target": 4,
            "coefficient": 1.0,
            "accuracy": [0.5, 0.75, 0.75, 0.75],
            "log_prob": [-0.1, -2.0, -1.0, -1.0],
        }
    )
    assert enhancement._best(table, "add") == Enhancement(2, 4)


def test_holms_correction_by_hand() -> None:
    found = holm(np.array([0.01, 0.04, 0.03, 0.5]))
    np.testing.assert_allclose(found, [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(holm(np.array([0.9, 0.6])), [1.0, 1.0])


def test_tracks_are_laid_together(toy: LALM, samples: list) -> None:
    tracks = {"Emotion": samples, "Gender": alp.toy_clips("toy/qwen2-audio", "Gender").samples("open+is")}
    found = enhance_tracks(toy, tracks, sources=[1], targets=[4, 5], coefficients=[1.0])
    table = held_out_table(found)
    assert table["setting"].tolist() == ["Emotion", "Gender"]
    assert table["chance"].tolist() == [1 / 5, 1 / 2]
    assert (table["p_of_all"] >= table["p"]).all()


def test_a_sweep_goes_on_from_what_is_on_disk(
    toy: LALM, samples: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(folder=tmp_path / "parts", batch_size=3, positions=["audio"], choose_by="information")
    found = sweep(toy, samples, **settings)
    back = EnhanceResult.load(found.save(tmp_path / "saved"))
    assert back.chosen == found.chosen
    pd.testing.assert_frame_equal(back.held_out(), found.held_out())
    pd.testing.assert_frame_equal(back.to_frame(), found.to_frame())
    monkeypatch.setattr(enhancement, "store", lambda *args, **kwargs: pytest.fail("computed again"))
    again = sweep(toy, samples, **settings)
    assert torch.equal(again.scores.label_logits, found.scores.label_logits)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        sweep(toy, samples, **{**settings, "how": "matched"})
    with pytest.raises(ResultError, match="differ in options"):
        EnhanceResult.concat([found, replace(found, header=replace(found.header, options={}))])


def test_figures_say_which_clips_they_are_of(toy: LALM, samples: list) -> None:
    found = sweep(toy, samples)
    axes = found.plot().axes[0]
    assert axes.get_title(loc="left").startswith("development clips")
    assert axes.get_ylabel().startswith("source layer")
    assert axes.get_xlabel().startswith("target layer")
    assert "held-out" in found.plot_held_out().axes[0].get_ylabel()
    informed = sweep(toy, samples, choose_by="information").plot().axes[0]
    assert informed.get_ylabel() == "coefficient"


def test_a_sweep_of_nothing_is_refused(toy: LALM, samples: list) -> None:
    labels = alp.TRACKS["Emotion"].labels
    with pytest.raises(CellError, match="no setting"):
        enhance_sweep(toy, samples, labels, sources=[3], targets=[3])
    with pytest.raises(CellError, match="layers 0 to 7"):
        enhance_sweep(toy, samples, labels, targets=[8])
    with pytest.raises((CellError, TypeCheckError), match="luck"):
        enhance_sweep(toy, samples, labels, choose_by="luck")


# The grid, which is judged afterwards.


GRID = dict(sources=[1, 5], targets=[1, 3, 6], coefficients=[1.0, 2.0], positions=["last", "audio"])
LABELS = alp.TRACKS["Emotion"].labels


@pytest.fixture(scope="module")
def grid(toy: LALM, samples: list) -> EnhanceResult:
    return enhance_grid(toy, samples, LABELS, batch_size=3, **GRID)


def groups_of(samples: list) -> list[str]:
    """Every clip is a group of its own: the toy's are all different."""
    return [sample.name for sample in samples]


def test_every_clip_of_a_grid_has_every_setting(grid: EnhanceResult, samples: list) -> None:
    assert grid.samples["sample"].tolist() == [sample.name for sample in samples]
    lines = [tuple(line) for line in grid.cells[["sample", *enhancement.SETTING]].to_numpy().tolist()]
    assert len(set(lines)) == len(lines) == len(samples) * 2 * 5 * 2
    assert {line[0] for line in lines} == set(range(len(samples)))


def test_a_judged_grid_is_the_sweep_with_the_same_split(toy: LALM, grid: EnhanceResult, samples: list) -> None:
    for share, seed in ((0.5, 0), (0.3, 4)):
        found = judged(grid, groups_of(samples), share, seed)
        wanted = enhance_sweep(toy, samples, LABELS, batch_size=3, development=share, seed=seed, **GRID)
        assert found.header == wanted.header
        pd.testing.assert_frame_equal(found.held_out(), wanted.held_out(), check_exact=True)
        pd.testing.assert_frame_equal(found.development(), wanted.development(), atol=TOLERANCE)
        pd.testing.assert_frame_equal(found.samples, wanted.samples)
        by = ["sample", *enhancement.SETTING]  # the order of cells is not promised
        cells = [one.to_frame().sort_values(by, ignore_index=True) for one in (found, wanted)]
        pd.testing.assert_frame_equal(*cells, rtol=1e-3, atol=TOLERANCE)
        assert repr(found) == repr(wanted)
        assert found.plot().axes[0].get_title(loc="left") == wanted.plot().axes[0].get_title(loc="left")
        assert found.plot_held_out().axes


def test_batches_of_a_grid_join_in_any_number(
    toy: LALM, grid: EnhanceResult, samples: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parts"
    parts = [
        enhance_grid(toy, part, LABELS, batch_size=3, folder=folder, **GRID) for part in (samples[6:], samples[:6])
    ]
    saved = [part.save(tmp_path / str(place)) for place, part in enumerate(reversed(parts))]
    joined = EnhanceResult.concat([EnhanceResult.load(place) for place in saved])
    pd.testing.assert_frame_equal(joined.to_frame(), grid.to_frame(), rtol=1e-3, atol=TOLERANCE)
    found, wanted = (judged(one, groups_of(samples)) for one in (joined, grid))
    pd.testing.assert_frame_equal(found.held_out(), wanted.held_out())
    monkeypatch.setattr(enhancement, "store", lambda *args, **kwargs: pytest.fail("computed again"))
    again = enhance_grid(toy, samples, LABELS, batch_size=3, folder=folder, **GRID)
    assert torch.equal(again.scores.label_logits, joined.scores.label_logits)


def made_better(grid: EnhanceResult, cells: np.ndarray) -> EnhanceResult:
    """The truth's logit of these cells is raised far above all others."""
    logits, log_partition = grid.scores.label_logits.clone(), grid.scores.log_partition.clone()
    truths = [LABELS.index(word) for word in grid.samples["truth"].iloc[grid.cells["sample"]]]
    logits[np.flatnonzero(cells), np.array(truths)[cells]] = 50.0
    log_partition[cells] = 50.0
    return replace(grid, scores=replace(grid.scores, label_logits=logits, log_partition=log_partition))


def test_scores_of_held_out_clips_do_not_enter_the_choice(grid: EnhanceResult, samples: list) -> None:
    """Settings that were not chosen are made perfect: on held-out clips that changes nothing, on the others all."""
    groups = groups_of(samples)
    found = judged(grid, groups)
    held = grid.samples["sample"].isin(found.samples["sample"][found.samples["split"] == "held-out"]).to_numpy()
    held = held[grid.cells["sample"].to_numpy()]
    setting = [getattr(found.chosen, name) for name in enhancement.SETTING]
    others = np.array([line != setting for line in grid.cells[enhancement.SETTING].to_numpy().tolist()])
    assert 0 < (held & others).sum() < len(held)
    again = judged(made_better(grid, held & others), groups)
    assert again.header == found.header
    pd.testing.assert_frame_equal(again.held_out(), found.held_out())
    of_chosen = judged(made_better(grid, held & ~others), groups)
    assert of_chosen.chosen == found.chosen
    assert of_chosen.held_out()["after"].item() == 1.0 > found.held_out()["after"].item()
    pd.testing.assert_frame_equal(of_chosen.development(), found.development())
    assert judged(made_better(grid, ~held & others), groups).chosen != found.chosen


def test_a_speaker_is_on_one_side(grid: EnhanceResult, samples: list) -> None:
    speakers = [f"speaker {place // 2}" for place in range(len(samples))]
    found = judged(grid, speakers)
    of = dict(zip(grid.samples["sample"], speakers, strict=True))
    sides = [{of[name] for name in part["sample"]} for _, part in found.samples.groupby("split")]
    assert len(sides) == 2
    assert sides[0] & sides[1] == set()
    assert sum(map(len, sides)) == len(samples) // 2


def test_groups_are_drawn_within_labels() -> None:
    groups = [f"{label} {place}" for place in range(20) for label in ("dog", "cat") for _ in range(3)]
    development, held_out = split_groups(groups, [group.split()[0] for group in groups], 0.25, 0)
    assert sorted(development + held_out) == list(range(120))
    chosen = {groups[place] for place in development}
    assert len(development) == 3 * len(chosen)
    assert sorted(group.split()[0] for group in chosen) == ["cat"] * 5 + ["dog"] * 5


def test_a_grid_claims_no_gain_and_a_sweep_is_not_judged_again(grid: EnhanceResult, samples: list) -> None:
    assert "nothing is chosen" in repr(grid)
    for ask in (grid.development, grid.held_out, grid.plot, grid.plot_held_out, lambda: grid.chosen):
        with pytest.raises(ResultError, match="judged"):
            ask()
    with pytest.raises(ResultError, match="split already"):
        judged(judged(grid, groups_of(samples)), groups_of(samples))
    with pytest.raises(ValueError, match="1 groups do not fit the 14 clips"):
        judged(grid, ["one"])
    with pytest.raises(ValueError, match="leave one side of the split empty"):
        judged(grid, ["one"] * len(samples))


def test_a_grid_of_nothing_is_refused(toy: LALM, samples: list) -> None:
    with pytest.raises(CellError, match="no setting"):
        enhance_grid(toy, samples, LABELS, sources=[3], targets=[3])
    with pytest.raises(CellError, match="layers 0 to 7"):
        enhance_grid(toy, samples, LABELS, sources=[8])

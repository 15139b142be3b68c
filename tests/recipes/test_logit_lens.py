"""The logit lens against transformers' own hidden states, and its statistics against hand-made numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.labels import LabelError
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.recipes import logit_lens as room
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.results import Header, ResultError
from audio_lens_plugin.spans import Role, SpanError

ANIMALS = ("dog", "cat", "cow")
ANSWER = "The animal in the sound file is"


@pytest.fixture(scope="module")
def batch(toy: LALM, clips: list[Clip]):
    return toy.prompt(clips, answer=ANSWER, attribute="animal")


@pytest.fixture
def samples(clips: list[Clip]) -> list[Sample]:
    truths = ["dog", "cat", "cow", "dog", "cat"]
    many = [clips[index % 3] for index in range(5)]
    return [
        Sample(f"clip_{index}", Prompt(clips=(clip,), answer=ANSWER, attribute="animal"), truth)
        for index, (clip, truth) in enumerate(zip(many, truths, strict=True))
    ]


def made(label_logits: np.ndarray, truths: list[str], answers: list[str], labels: tuple[str, ...]) -> LensResult:
    """A result with one row, the last position, per sample; the whole vocabulary is the labels."""
    logits = torch.tensor(label_logits, dtype=torch.float32)
    count = logits.shape[1]
    rows = {"sample": range(count), "span": "last", "index": 0, "position": 9, "token": "is"}
    return LensResult(
        header=Header("logit_lens", "hand", None, "", "float32", "sdpa", "custom", labels),
        samples=pd.DataFrame({"sample": [f"s{i}" for i in range(count)], "truth": truths, "answer": answers}),
        rows=pd.DataFrame(rows).assign(start=np.nan, end=np.nan),
        label_logits=logits,
        log_partition=logits.logsumexp(-1),
        top_ids=torch.zeros(*logits.shape[:2], 0, dtype=torch.int64),
        top_log_probs=torch.zeros(*logits.shape[:2], 0),
        top_words={},
    )


def test_every_layer_equals_the_norm_and_head_on_its_hidden_state(toy: LALM, batch) -> None:
    result = logit_lens(toy, batch, ANIMALS, ["last", "attribute", "audio"])
    with torch.no_grad():
        out = toy.module(**toy.inputs(batch), output_hidden_states=True)
        norm, head = toy.module.model.language_model.norm, toy.module.lm_head
        layers = [head(norm(state)) for state in out.hidden_states[:-1]] + [out.logits]
    for span in ("last", "attribute", "audio"):
        chosen = batch.at(span)
        rows = (result.rows["span"] == span).tolist()
        for layer, logits in enumerate(layers):
            expected = logits[chosen.rows, chosen.cols]
            ids = toy.labels(ANIMALS).first
            torch.testing.assert_close(result.label_logits[layer, rows], expected[:, ids], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(result.log_partition[layer, rows], expected.logsumexp(-1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_layer_equals_the_models_own_logits(clips: list[Clip], dtype: torch.dtype) -> None:
    lalm = load("toy/qwen2-audio", dtype=dtype)
    batch = lalm.prompt([*clips, None], question="What animal makes the sound?", answer=ANSWER)
    result = logit_lens(lalm, batch, ANIMALS)
    with torch.no_grad():
        logits = lalm.module(**lalm.inputs(batch)).logits[:, -1].float()
    ids = lalm.labels(ANIMALS).first
    # The model unembeds all positions at once, the lens only those asked for: bf16 rounds once per matrix product.
    close = dict(atol=2e-5, rtol=2e-5) if dtype is torch.float32 else dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(result.label_logits[-1], logits[:, ids], **close)
    torch.testing.assert_close(result.log_partition[-1], logits.logsumexp(-1), **close)


def test_one_forward_pass_and_only_asked_for_positions_meet_the_unembedding(toy: LALM, batch, monkeypatch) -> None:
    monkeypatch.setattr(ops, "CHUNK_ROWS", 5)
    passes, rows = [], []
    blocks, head = toy.module.model.language_model.layers, toy.module.lm_head
    hooks = [
        blocks[0].register_forward_hook(lambda *_: passes.append(1)),
        head.register_forward_hook(lambda module, args, out: rows.append(tuple(args[0].shape))),
    ]
    try:
        result = logit_lens(toy, batch, ANIMALS, ["last", "audio"])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(passes) == 1
    assert max(shape[0] for shape in rows) == 5, "logits exist for one chunk of rows at a time"
    assert all(len(shape) == 2 for shape in rows), "the model's own unembedding of all positions did not run"
    assert sum(shape[0] for shape in rows) == 9 * len(result.rows)


def test_chunking_changes_no_number(toy: LALM, batch, monkeypatch) -> None:
    whole = logit_lens(toy, batch, ANIMALS, ["last", "audio"])
    monkeypatch.setattr(ops, "CHUNK_ROWS", 7)
    chunked = logit_lens(toy, batch, ANIMALS, ["last", "audio"])
    torch.testing.assert_close(whole.label_logits, chunked.label_logits, atol=1e-5, rtol=1e-5)


def test_top_words_are_the_best_of_the_whole_vocabulary(toy: LALM, batch) -> None:
    result = logit_lens(toy, batch, ANIMALS, top_k=4)
    with torch.no_grad():
        best = toy.module(**toy.inputs(batch)).logits[:, -1].log_softmax(-1).topk(4)
    assert torch.equal(result.top_ids[-1], best.indices)
    torch.testing.assert_close(result.top_log_probs[-1], best.values, atol=1e-5, rtol=1e-5)
    frame = result.top_frame()
    assert len(frame) == 9 * 3 * 4
    assert set(frame["word"]) <= {toy.tokenizer.decode([token]) for token in result.top_ids.flatten().tolist()}


def test_the_answer_is_what_the_model_says(toy: LALM, batch) -> None:
    assert logit_lens(toy, batch, ANIMALS).samples["answer"].tolist() == toy.answer(batch, ANIMALS).words


def test_positions_are_counted_without_padding(toy: LALM, batch, clips: list[Clip]) -> None:
    together = logit_lens(toy, batch, ANIMALS, ["attribute"])
    alone = logit_lens(toy, toy.prompt(clips[0], answer=ANSWER, attribute="animal"), ANIMALS, ["attribute"])
    assert together.rows["position"].iloc[0] == alone.rows["position"].iloc[0]
    assert together.rows["token"].iloc[0].strip() == "animal"


def test_an_unknown_position_is_refused(toy: LALM, batch) -> None:
    with pytest.raises(SpanError, match="no position is 'elephant'"):
        logit_lens(toy, batch, ANIMALS, ["elephant"])


def test_labels_that_collide_are_told_before_the_work(toy: LALM, samples, monkeypatch) -> None:
    monkeypatch.setattr(room, "_read", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(LabelError, match="begin with the same token"):
        logit_lens(toy, samples, ["barking dog", "barking cow"])


def test_whole_labels_are_read_at_every_layer(toy: LALM, batch) -> None:
    """The last layer against `LALM.answer`, which works another way; labels of one token against the plain lens."""
    labels = ["barking dog", "barking cow", "cat"]
    result = logit_lens(toy, batch, labels, whole=True)
    answers = toy.answer(batch, labels, whole=True)
    torch.testing.assert_close(result.log_probs[-1], answers.log_probs, atol=1e-4, rtol=1e-4)
    assert result.samples["answer"].tolist() == answers.words
    plain = logit_lens(toy, batch, ANIMALS)
    whole = logit_lens(toy, batch, ANIMALS, whole=True)
    torch.testing.assert_close(whole.log_probs, plain.log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{"positions": ["audio"]}, {"top_k": 2}])
def test_whole_labels_follow_the_prompt_and_nothing_else(toy: LALM, batch, more: dict) -> None:
    with pytest.raises(ValueError, match="at the last position alone"):
        logit_lens(toy, batch, ANIMALS, whole=True, **more)


def test_the_information_score_is_the_share_with_the_true_label_on_top() -> None:
    logits = np.zeros((3, 4, 2))
    logits[1, :, 0] = [1, 1, -1, -1]  # after layer 1 samples 0 and 1 say "yes"
    logits[2, :, 0] = [1, 1, 1, -1]
    result = made(logits, ["yes", "yes", "yes", "no"], ["yes", "yes", "yes", "no"], ("yes", "no"))
    table = result.information()
    assert table["score"].tolist() == [0.75, 0.75, 1.0]  # layer 0: ties go to the first label
    assert table["chance"].unique().tolist() == [0.5]
    assert (table["low"] <= table["score"]).all()
    assert (table["score"] <= table["high"]).all()
    assert table["samples"].unique().tolist() == [4]


def test_the_critical_layer_is_the_weighted_mean_of_the_paper() -> None:
    """I = 0.5, 0.8, 1.0 after layers 1 to 3, |Y| = 2, a = 0.2: weights 0, 0.2, 0.4, so (2 * 0.2 + 3 * 0.4) / 0.6."""
    right = {1: 5, 2: 8, 3: 10}
    logits = np.zeros((4, 10, 2))
    for layer, count in right.items():
        logits[layer, :, 0] = np.where(np.arange(10) < count, 1, -1)
    result = made(logits, ["yes"] * 10, ["yes"] * 10, ("yes", "no"))
    critical = result.critical_layer()
    assert critical.threshold == pytest.approx(0.6)
    assert critical.layer == pytest.approx((2 * 0.2 + 3 * 0.4) / 0.6)
    assert str(critical) == "2.67"


def test_embeddings_carry_no_weight_in_the_critical_layer() -> None:
    logits = np.zeros((3, 4, 2))  # every layer a tie, which the first label wins: I = 1 at layer 0, too
    logits[1:, :, 0] = 1
    assert made(logits, ["yes"] * 4, ["yes"] * 4, ("yes", "no")).critical_layer().layer == pytest.approx(1.5)


def test_the_critical_layer_is_undefined_where_nothing_exceeds_the_threshold() -> None:
    result = made(np.zeros((3, 4, 2)), ["yes", "no", "yes", "no"], ["yes"] * 4, ("yes", "no"))
    critical = result.critical_layer()
    assert critical.layer is None
    assert "undefined: no layer's information score exceeds 0.600 (the best is 0.500)" in str(critical)


def test_a_score_at_the_threshold_does_not_exceed_it() -> None:
    """Two right of five, three labels: 0.4, and (1 + 0.2) / 3 is 0.39999999999999997 to a computer."""
    answers = ["a", "a", "b", "b", "b"]
    assert made(np.eye(3)[[[0] * 5] * 2], answers, ["a"] * 5, ("a", "b", "c")).critical_layer().layer is None


def right_at(*layers: list[bool]) -> LensResult:
    """A result of samples that all have the truth "yes": which of them say so after each layer."""
    logits = np.zeros((len(layers) + 1, len(layers[0]), 2))
    logits[1:, :, 1] = np.where(layers, -1, 1)
    return made(logits, ["yes"] * len(layers[0]), ["yes"] * len(layers[0]), ("yes", "no"))


def test_the_interval_of_the_critical_layer_draws_whole_samples() -> None:
    """Half know it after layer 1, the others after layer 2: seven of ten decide, and a coin says which."""
    first = [True] * 5 + [False] * 5
    result = right_at(first, [not right for right in first])
    assert result.critical_layer().layer is None
    low, high, undefined = result.critical_interval(resamples=4000)
    assert (low, high) == (1, 2)
    assert undefined == pytest.approx((210 + 252 + 210) / 2**10, abs=0.03)  # four, five or six of ten coins


def test_samples_that_agree_leave_no_doubt_about_the_critical_layer() -> None:
    result = right_at([False] * 10, [True] * 10, [True] * 10)
    assert result.critical_layer().layer == 2.5
    assert result.critical_interval() == (2.5, 2.5, 0)


def test_the_interval_contains_the_critical_layer_and_shrinks_with_more_samples() -> None:
    random = np.random.default_rng(0)
    widths = []
    for samples in (20, 80, 320):
        result = right_at(*[(random.random(samples) < share).tolist() for share in (0.5, 0.7, 0.9)])
        low, high, _ = result.critical_interval()
        assert low < result.critical_layer().layer < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_the_interval_holds_95_of_100_critical_layers_of_drawn_samples() -> None:
    random = np.random.default_rng(0)
    right = random.random((3, 100)) < [[0.8], [0.85], [0.95]]
    score = right[:, random.integers(0, 100, (8000, 100))].mean(axis=-1)
    layers = ((score - 0.6) * [[1], [2], [3]]).sum(axis=0) / (score - 0.6).sum(axis=0)  # all above the threshold
    low, high, _ = right_at(*right.tolist()).critical_interval(resamples=8000)
    assert np.mean(layers < low) == pytest.approx(0.025, abs=0.01)
    assert np.mean(layers > high) == pytest.approx(0.025, abs=0.01)


def test_the_interval_is_undefined_where_the_critical_layer_is() -> None:
    low, high, undefined = right_at([False] * 4, [False] * 4).critical_interval()
    assert np.isnan([low, high]).all()
    assert undefined == 1


def test_the_interval_has_a_threshold_and_a_seed() -> None:
    result = right_at([True] * 6 + [False] * 4, [True] * 8 + [False] * 2)
    assert result.critical_interval(seed=1) == result.critical_interval(seed=1)
    assert result.critical_interval(seed=1) != result.critical_interval(seed=2)
    assert result.critical_interval(a=0.0).undefined < result.critical_interval(a=0.2).undefined
    assert result.critical_interval(a=1.0).undefined == 1


def test_success_and_failure_curves_are_means_over_right_and_wrong_answers() -> None:
    probability = np.array([[0.5, 0.5, 0.5], [0.9, 0.7, 0.2]])  # layers by samples, of "yes"
    logits = np.log(np.stack([probability, 1 - probability], axis=-1))
    result = made(logits, ["yes", "yes", "yes"], ["yes", "yes", "no"], ("yes", "no"))
    curves = result.curves().set_index(["outcome", "layer"])
    assert curves.loc[("success", 1), "probability"] == pytest.approx(0.8)
    assert curves.loc[("failure", 1), "probability"] == pytest.approx(0.2)
    assert curves.loc[("failure", 1), "samples"] == 1
    assert result.accuracy == pytest.approx(2 / 3)


def test_changes_are_told_clip_by_clip_and_tested_over_layers() -> None:
    """Ten wrong answers whose truth was likelier at layer 2 in every clip, and at layer 1 in every other one."""
    steps = np.linspace(0.01, 0.1, 10)
    probability = np.stack([np.full(10, 0.9), 0.2 + 0.1 * (-1) ** np.arange(10), 0.3 + steps, np.full(10, 0.2)])
    logits = np.log(np.stack([probability, 1 - probability], axis=-1))
    table = made(logits, ["yes"] * 10, ["no"] * 10, ("yes", "no")).changes().set_index(["outcome", "layer"])
    assert list(table.index) == [("failure", 1), ("failure", 2)], "neither embeddings nor the last layer; no success"
    assert table.loc[("failure", 2), "change"] == pytest.approx(0.1 + steps.mean())
    assert table.loc[("failure", 2), "p_of_all"] < 0.01
    assert table.loc[("failure", 1), "change"] == pytest.approx(0.0, abs=1e-9)
    assert table.loc[("failure", 1), "p_of_all"] > 0.5
    with pytest.raises(ValueError, match="'audio' was not read"):
        made(logits, ["yes"] * 10, ["no"] * 10, ("yes", "no")).changes("audio")


def with_audio(result: LensResult, samples: list[int], label_logits: np.ndarray) -> LensResult:
    """The result with audio positions, too: the sample of each, and what it holds."""
    more = result.rows.iloc[samples].assign(span="audio", index=range(len(samples)))
    logits = torch.cat([result.label_logits, torch.tensor(label_logits, dtype=torch.float32)], dim=1)
    return replace(
        result,
        rows=pd.concat([result.rows, more], ignore_index=True),
        label_logits=logits,
        log_partition=logits.logsumexp(-1),
        top_ids=torch.zeros(*logits.shape[:2], 0, dtype=torch.int64),
        top_log_probs=torch.zeros(*logits.shape[:2], 0),
    )


def test_a_span_of_several_positions_counts_the_share_within_each_sample() -> None:
    result = made(np.zeros((2, 3, 2)), ["yes", "yes", "yes"], ["yes"] * 3, ("yes", "no"))
    logits = np.zeros((2, 2, 2))
    logits[1, :, 0] = [1, -1]
    table = with_audio(result, [0, 0], logits).information().set_index(["span", "layer"])
    assert table.loc[("audio", 1), "score"] == pytest.approx(0.5)
    assert table.loc[("audio", 1), "samples"] == 1


def test_shares_tell_what_is_on_top_at_the_positions_of_each_sample() -> None:
    on_top = np.eye(3)
    result = made(on_top[[[0, 0, 2], [1, 2, 2]]], ["a", "b", "c"], ["b", "c", "c"], ("a", "b", "c"))
    # Sample 2 has two positions and sample 0 four, in no order; sample 1 has none.
    result = with_audio(result, [2, 0, 0, 2, 0, 0], on_top[[[1, 0, 0, 2, 0, 0], [2, 1, 0, 2, 1, 1]]])
    assert result.label_shares().tolist() == on_top[[[0, 1], [0, 2], [2, 2]]].tolist()
    assert result.label_shares("audio").tolist() == [[[1, 0, 0], [0.25, 0.75, 0]], [[0, 0.5, 0.5], [0, 0, 1]]]
    scores = result.information().pivot_table(index="span", columns="layer", values="score")
    assert scores.loc["audio"].tolist() == [(1 + 0.5) / 2, (0.25 + 1) / 2]


def test_shares_of_a_model_sum_to_one_and_need_no_truths(toy: LALM, batch) -> None:
    shares = logit_lens(toy, batch, ANIMALS, ["audio"]).label_shares("audio")
    assert shares.shape == (3, 9, 3)
    np.testing.assert_allclose(shares.sum(-1), 1)


def test_the_excess_of_a_span_is_told_as_a_share_of_the_last_position() -> None:
    """Above a chance of 0.5 the last position holds 0.5 + 0.5 for either sample, the audio 0 + 0.5 and 0.5 - 0.25."""
    positions = [0, 0, 1, 1, 1, 1]
    logits = np.zeros((3, 6, 2))
    logits[0, :, 1] = 1  # embeddings are no layer
    logits[1, :, 1] = [-1, 1, -1, -1, -1, -1]
    logits[2, :, 1] = [-1, -1, -1, 1, 1, 1]
    last = [[True, True, False], [True, True, False]]  # sample 2 has no audio, and does not count
    share = with_audio(right_at(*last), positions, logits).excess_share("audio")
    assert share == pytest.approx(((0.5 + 0.25) / 2, 0.25, 0.5))


def test_a_share_of_itself_is_one() -> None:
    assert right_at([True, True, False], [True, False, True]).excess_share("last") == (1, 1, 1)


@pytest.mark.parametrize("right", [[True, False], [False, False]])
def test_there_is_no_share_of_a_last_position_that_holds_nothing(right: list[bool]) -> None:
    result = with_audio(right_at(right, right), [0, 1], np.zeros((3, 2, 2)))
    assert np.isnan(result.excess_share("audio")).all()


@pytest.mark.parametrize("method", ["label_shares", "critical_layer", "critical_interval", "excess_share"])
def test_a_span_that_was_not_read_is_told(method: str) -> None:
    with pytest.raises(ValueError, match=r"'audio' was not read; this result has \['last'\]"):
        getattr(right_at([True, False]), method)("audio")


def test_a_result_is_read_back_as_it_was(toy: LALM, samples, tmp_path: Path) -> None:
    result = logit_lens(toy, samples, ANIMALS, ["last", "audio"], top_k=2, batch_size=2)
    again = LensResult.load(result.save(tmp_path / "result"))
    for name in ("label_logits", "log_partition", "top_ids", "top_log_probs"):
        assert torch.equal(getattr(result, name), getattr(again, name)), name
    pd.testing.assert_frame_equal(result.to_frame(), again.to_frame())
    pd.testing.assert_frame_equal(result.top_frame(), again.top_frame())
    assert again.header == result.header
    assert again.header.model == "toy/qwen2-audio"
    assert again.header.versions["torch"].startswith("2.")
    assert again.critical_layer() == result.critical_layer()


def test_a_result_of_a_bare_batch_is_read_back_too(toy: LALM, batch, tmp_path: Path) -> None:
    result = logit_lens(toy, batch, ANIMALS)
    again = LensResult.load(result.save(tmp_path / "result"))
    assert again.samples["truth"].isna().all()
    assert "truth" not in again.plot_sample(0).axes[0].get_title(loc="left")
    assert torch.equal(result.label_logits, again.label_logits)


def test_the_frame_is_tidy(toy: LALM, samples) -> None:
    frame = logit_lens(toy, samples, ANIMALS, ["attribute"]).to_frame()
    assert len(frame) == 5 * 2 * 9 * 3  # samples, positions, layers, labels
    one = frame[(frame["sample"] == "clip_1") & (frame["span"] == "last") & (frame["layer"] == 8)]
    assert one["label"].tolist() == list(ANIMALS)
    assert one["truth"].unique().tolist() == ["cat"]
    best = one.loc[one["logit"].idxmax(), "label"]
    assert best == one["answer"].iloc[0]


def test_a_second_start_computes_only_what_is_missing(toy: LALM, samples, tmp_path: Path, monkeypatch) -> None:
    straight = logit_lens(toy, samples, ANIMALS, batch_size=2)
    read = room._read
    done = []

    def dies_at_the_second(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return read(*args)

    monkeypatch.setattr(room, "_read", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        logit_lens(toy, samples, ANIMALS, batch_size=2, folder=tmp_path)
    again = []
    monkeypatch.setattr(room, "_read", lambda *args: again.append(1) or read(*args))
    resumed = logit_lens(toy, samples, ANIMALS, batch_size=2, folder=tmp_path)
    assert len(again) == 2, "of three batches the first lay on disk"
    pd.testing.assert_frame_equal(resumed.to_frame(), straight.to_frame(), check_exact=True)


def test_other_settings_do_not_reuse_finished_batches(toy: LALM, samples, tmp_path: Path) -> None:
    logit_lens(toy, samples, ANIMALS, folder=tmp_path)
    other = logit_lens(toy, samples, ANIMALS, ["attribute"], folder=tmp_path)
    assert other.spans == ["attribute", "last"]
    assert len(list(tmp_path.iterdir())) == 2


def test_parts_of_different_experiments_are_not_joined(toy: LALM, batch) -> None:
    parts = [logit_lens(toy, batch, ANIMALS), logit_lens(toy, batch, ANIMALS, top_k=1)]
    with pytest.raises(ResultError, match="they differ in options"):
        LensResult.concat(parts)


@pytest.mark.parametrize(
    "score",
    [LensResult.information, LensResult.critical_interval, lambda result: result.excess_share("last")],
)
def test_scores_without_truths_are_refused(toy: LALM, batch, score) -> None:
    with pytest.raises(ValueError, match="true labels of these samples are not known"):
        score(logit_lens(toy, batch, ANIMALS))


def test_pictures_are_drawn_with_and_without_truths(toy: LALM, batch, samples) -> None:
    with_truth = logit_lens(toy, samples, ANIMALS, ["audio", "attribute"])
    lines = {line.get_label() for line in with_truth.plot().axes[0].get_lines()}
    assert {"last", "attribute", "audio", "chance"} <= lines
    image = with_truth.plot_sample(1).axes[0].collections[0].get_array()
    assert image.shape == (9, len(set(with_truth.rows.loc[with_truth.rows["sample"] == 1, "position"])))
    assert len(logit_lens(toy, batch, ANIMALS).plot().axes) == 4  # three samples and the colour bar
    assert "critical layer" in with_truth._repr_html_()
    assert repr(with_truth).startswith("logit lens of toy/qwen2-audio: 5 samples, 8 layers, positions audio, attribute")
    assert "tensor" not in repr(with_truth)
    assert "noise" not in logit_lens(toy, batch, ANIMALS)._repr_html_()


@pytest.mark.parametrize(("model", "positions"), [("toy/qwen2-audio", ["all"]), ("toy/desta2", ["all", "audio[0]"])])
def test_a_result_knows_which_positions_hear(model: str, positions: list[str], samples) -> None:
    """Those that hear seconds; where there are none, those that were asked for as audio."""
    lalm = load(model)
    result = logit_lens(lalm, samples[:2], ANIMALS, positions)
    for index, sample in enumerate(samples[:2]):
        roles = lalm.batch([sample.prompt]).positions.roles
        table = result.positions(index)
        assert len(table) == int((roles != Role.PAD).sum())
        assert table["audio"].tolist() == (roles[roles != Role.PAD] == Role.AUDIO).tolist()
        assert table["audio"].any()
        assert table["position"].is_monotonic_increasing
        assert (result.rows.loc[table.index, "sample"] == index).all()


def test_a_clip_is_drawn_above_its_positions(toy: LALM, samples) -> None:
    result = logit_lens(toy, samples, ANIMALS, ["audio"])
    without, beside = (result.plot_sample(1, clip=clip) for clip in (None, samples[1].prompt.clips[0]))
    assert len(beside.axes) == len(without.axes) + 1
    np.testing.assert_array_equal(*(drawn.axes[-2].collections[0].get_array() for drawn in (without, beside)))


def test_a_plan_says_what_a_run_takes(toy: LALM, batch) -> None:
    plan = room.plan(toy, batch, labels=3, positions=["attribute", "audio"], top_k=2)
    result = logit_lens(toy, batch, ANIMALS, ["attribute", "audio"], top_k=2)
    tensors = (result.label_logits, result.log_partition, result.top_ids, result.top_log_probs)
    assert plan.result == sum(tensor.nbytes for tensor in tensors)
    assert (plan.layers, plan.read) == tuple(result.label_logits.shape[:2])
    assert plan.positions == batch.shape[1]
    assert plan.weights == sum(tensor.nbytes for tensor in toy.module.parameters())


def test_a_plan_holds_one_chunk_of_logits(toy: LALM, batch) -> None:
    words, width = toy.unembed._module.weight.shape
    narrow, wide = room.plan(toy, batch, 3), room.plan(toy, batch, 3, ["audio"])
    assert narrow.working == 126 * width * 4 + 126 * words * 8  # 42 layers of three rows fill a chunk of 128
    assert wide.working == len(batch.at("audio")) * width * 4 + len(batch.at("audio")) * words * 8 + 3 * (
        width * 4 + words * 8
    )

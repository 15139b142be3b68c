"""What every family must do, by the same tests: a family in patches/ is found and tested without an edit here.

A family is tested on its toy where the shelf has one, on a tiny random model (tests/tiny/) where it has none.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from models import MODELS, for_several_clips, open_model

from audio_lens_plugin.audio import AudioError, Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import families
from audio_lens_plugin.prompts import PromptError
from audio_lens_plugin.spans import Role, SpanError

ANSWER = "The sound file's animal is"
QUESTION = "What animal makes the sound?"


@pytest.fixture(scope="module", params=MODELS)
def lalm(request: pytest.FixtureRequest) -> LALM:
    return open_model(request.param)


def logits_at_last(lalm: LALM, batch) -> torch.Tensor:
    with torch.no_grad(), lalm.trace(batch):
        logits = lalm.unembed.output[:, -1].save()
    return logits.float()


def test_every_family_is_tested_on_a_model() -> None:
    assert {open_model(name).family.name for name in MODELS} == set(families())


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_a_family_says_what_it_is(family) -> None:
    assert family.architectures
    assert family.repo_ids
    assert all("/" in repo for repo in family.repo_ids)
    assert len(family.verified) > 20
    assert family.model_class().__name__ in family.architectures


def test_logits_equal_plain_transformers(lalm: LALM, clips: list[Clip]) -> None:
    batch = lalm.prompt(clips, question=QUESTION, answer=ANSWER)
    with torch.no_grad(), lalm.trace(batch):
        logits = lalm.unembed.output.save()
    with torch.no_grad():
        plain = lalm.module(**lalm.inputs(batch)).logits
    assert torch.equal(logits, plain)


def test_each_row_of_a_batch_equals_its_single_run(lalm: LALM, clips: list[Clip]) -> None:
    lalm = for_several_clips(lalm)
    rows = [[clips[0]], [clips[2], clips[1]], [], [clips[1]]]
    together = logits_at_last(lalm, lalm.prompt(rows, question=QUESTION, answer=ANSWER))
    for row, row_clips in enumerate(rows):
        alone = logits_at_last(lalm, lalm.prompt([row_clips], question=QUESTION, answer=ANSWER))
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_two_clips_give_two_answers(lalm: LALM, clips: list[Clip]) -> None:
    same_length = [clips[1], replace(clips[1], waveform=clips[1].waveform[::-1].copy() * 0.3), clips[1].silenced()]
    logits = logits_at_last(lalm, lalm.prompt(same_length, answer=ANSWER))
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_a_bfloat16_model_takes_float_audio(lalm: LALM, clips: list[Clip]) -> None:
    low = open_model(lalm.name, dtype=torch.bfloat16)
    batch = low.prompt(clips, answer=ANSWER)
    assert low.dtype == torch.bfloat16
    assert batch.inputs["input_features"].dtype == torch.float32
    inputs = low.inputs(batch)
    assert inputs["input_features"].dtype == next(low.audio_encoder._module.parameters()).dtype
    assert inputs["attention_mask"].dtype == torch.int64
    assert torch.isfinite(logits_at_last(low, batch)).all()


def test_roles_cover_every_position_once(lalm: LALM, clips: list[Clip]) -> None:
    lalm = for_several_clips(lalm)
    batch = lalm.prompt([[clips[2], clips[0]], [clips[1]]], question=QUESTION, answer=ANSWER, system="Listen.")
    roles = batch.positions.roles
    assert torch.equal(roles == Role.PAD, batch.inputs["attention_mask"] == 0)
    texts = {
        role: "".join(batch.positions.token_text(1, col) for col in (roles[1] == role).nonzero().flatten().tolist())
        for role in Role
    }
    assert texts[Role.ANSWER].strip() == ANSWER
    assert texts[Role.QUESTION].strip() == QUESTION
    assert texts[Role.SYSTEM].strip() == "Listen."
    assert set(texts[Role.AUDIO]) <= set(lalm.family.audio_token)
    assert len(batch.at("audio").row(0)) == len(batch.at("audio[0]").row(0)) + len(batch.at("audio[1]").row(0))


def test_audio_positions_are_where_the_projector_writes(lalm: LALM, clips: list[Clip]) -> None:
    batch = lalm.prompt(clips, answer=ANSWER)
    audio = batch.at("audio")
    with torch.no_grad(), lalm.trace(batch):
        embedded = lalm.embed.output.save()
        entering = lalm.blocks[0].input.save()
    changed = (embedded != entering).any(-1)
    assert bool(changed[audio.rows, audio.cols].all())
    changed[audio.rows, audio.cols] = False
    # Some families also write learned vectors over the tags around a clip: template, and the same for every clip.
    assert bool((batch.positions.roles[changed] == Role.TEMPLATE).all())
    assert len(entering[changed].unique(dim=0)) <= 2


def test_audio_positions_keep_the_models_time(lalm: LALM, clips: list[Clip]) -> None:
    rate = lalm.family.positions_per_second
    batch = lalm.prompt(clips, answer=ANSWER)
    if rate is None:
        with pytest.raises(SpanError, match="keep no time"):
            batch.at("audio", seconds=(0, 1))
        return
    chosen = batch.at("audio", seconds=(0.2, 0.4))
    assert len(chosen.row(2)) == math.ceil(0.4 * rate) - math.floor(0.2 * rate)
    seconds = batch.positions.seconds[chosen.rows, chosen.cols]
    assert float(seconds[:, 1].max()) <= 0.4 + 1 / rate
    whole = batch.positions.seconds[2, batch.at("audio").row(2)]
    # Some families also have positions for the silence behind a clip.
    assert clips[2].seconds - 1 / rate <= float(whole[-1, 1]) <= lalm.processor.feature_extractor.chunk_length
    assert float(whole[1, 0] - whole[0, 0]) == pytest.approx(1 / rate)


def test_a_quieter_stretch_of_sound_changes_those_positions_most(lalm: LALM, clips: list[Clip]) -> None:
    """Seconds mean what they say: what enters the language model moves where the waveform was changed."""
    if lalm.family.positions_per_second is None:
        pytest.skip("this family's audio positions keep no time")
    changed = clips[2].waveform.copy()
    changed[24_000:28_000] *= 0.3  # louder would not do: log-mel features are scaled by the loudest moment
    outputs = []
    batch = None
    for clip in (clips[2], replace(clips[2], waveform=changed)):
        batch = lalm.prompt(clip, answer=ANSWER)
        with torch.no_grad(), lalm.trace(batch):
            outputs.append(lalm.blocks[0].input[0].save())
    moved = (outputs[0] - outputs[1]).norm(dim=-1)
    stretch = batch.at("audio", seconds=(1.5, 1.75)).cols
    outside = moved[batch.at("audio", seconds=(0.0, 1.2)).cols]
    assert int(moved.argmax()) in stretch
    assert float(moved[stretch].median()) > 2 * float(outside.median())


def test_a_printed_batch_shows_role_time_and_text(lalm: LALM, clips: list[Clip]) -> None:
    shown = str(lalm.prompt(clips[2], question=QUESTION, answer=ANSWER))
    for piece in ("audio[0]", "template", "answer", "question", "noise_40000 (2.50 s)"):
        assert piece in shown
    if lalm.family.positions_per_second:
        assert re.search(r"audio\[0\]\s+0\.00-[\d.]+ s", shown)
    assert "<pre" in lalm.prompt(clips[2])._repr_html_()


def test_a_clip_longer_than_the_window_is_refused_or_cut_aloud(lalm: LALM) -> None:
    window = lalm.processor.feature_extractor.chunk_length
    long = Clip(torch.randn(int((window + 1.5) * 16_000)).numpy() * 0.1, 16_000, "long.wav")
    with pytest.raises(AudioError, match=r"long\.wav.*1\.50 s would be lost.*truncate=True"):
        lalm.prompt(long, answer=ANSWER)
    with pytest.warns(UserWarning, match=r"last 1\.50 s"):
        batch = lalm.prompt(long, answer=ANSWER, truncate=True)
    assert torch.isfinite(logits_at_last(lalm, batch)).all()


def test_a_clip_too_short_to_hear_is_refused(lalm: LALM) -> None:
    with pytest.raises(AudioError, match="too short"):
        lalm.prompt(Clip(torch.zeros(300).numpy(), 16_000, "click"), answer=ANSWER)


def test_a_clip_of_the_shortest_length_is_heard(lalm: LALM) -> None:
    shortest = Clip((0.1 * torch.randn(1_280)).numpy(), 16_000, "short")
    single = logits_at_last(lalm, lalm.prompt(shortest, answer=ANSWER))
    assert torch.isfinite(single).all()


@pytest.mark.parametrize("field", ["question", "answer", "system"])
def test_words_with_the_audio_placeholder_are_refused(lalm: LALM, clips: list[Clip], field: str) -> None:
    with pytest.raises(PromptError, match="special token"):
        lalm.prompt(clips[0], **{field: f"Listen: {lalm.family.audio_token}"})


def test_an_unexpanded_or_cut_placeholder_is_refused(lalm: LALM, clips: list[Clip]) -> None:
    batch = lalm.prompt(clips[1], answer=ANSWER)
    audio = batch.at("audio").cols
    unexpanded = {name: value.clone() for name, value in batch.inputs.items()}
    keep = torch.ones(unexpanded["input_ids"].shape[1], dtype=torch.bool)
    keep[audio[1:]] = False
    for name in ("input_ids", "attention_mask"):
        unexpanded[name] = unexpanded[name][:, keep]
    cut = dict(batch.inputs)
    for name in ("input_ids", "attention_mask"):
        cut[name] = cut[name][:, int(audio[3]) :]
    for inputs in (unexpanded, cut):
        with pytest.raises(PromptError, match=r"audio tokens for .* audio positions"):
            lalm.trace(inputs)


def test_text_with_audio_tokens_but_no_audio_is_refused(lalm: LALM, clips: list[Clip]) -> None:
    batch = lalm.prompt(clips[1], answer=ANSWER)
    with pytest.raises(PromptError, match="the audio would be lost"):
        lalm.trace({name: batch.inputs[name] for name in ("input_ids", "attention_mask")})


def test_an_empty_prompt_is_refused(lalm: LALM) -> None:
    with pytest.raises(PromptError, match="empty"):
        lalm.prompt()


def test_numbers_that_do_not_fit_are_refused(lalm: LALM, clips: list[Clip]) -> None:
    with pytest.raises(PromptError, match="2 values for question do not fit 3 rows"):
        lalm.prompt(clips, question=["a", "b"])


def test_words_that_look_like_template_are_labelled_by_their_place(lalm: LALM, clips: list[Clip]) -> None:
    """The user says the system's own words: the second occurrence is the question, not the system."""
    words = "You are a helpful assistant."
    batch = lalm.prompt(clips[0], question=words, answer="assistant")
    roles = batch.positions.roles[0].tolist()
    question = [batch.positions.token_text(0, col) for col, role in enumerate(roles) if role == Role.QUESTION]
    assert "".join(question).strip() == words
    assert len(batch.at("answer")) >= 1
    assert int(batch.at("answer").cols.max()) == int(batch.at("last").cols[0])

"""The model object: sites, answers, generation, inputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.labels import LabelError
from audio_lens_plugin.lalm import LALM

ANSWER = "The sound file's animal is"
ANIMALS = ("dog", "cat", "cow")


def test_the_same_words_reach_every_module(toy: LALM) -> None:
    assert toy.blocks[2].attn.o._module is toy.module.model.language_model.layers[2].self_attn.o_proj
    assert toy.blocks[2].ln1._module is toy.module.model.language_model.layers[2].input_layernorm
    assert toy.blocks[2].mlp.gate._module is toy.module.model.language_model.layers[2].mlp.gate_proj
    assert toy.audio_encoder.blocks[1].attn.q._module is toy.module.model.audio_tower.layers[1].self_attn.q_proj
    assert toy.audio_projector._module is toy.module.model.multi_modal_projector
    assert toy.unembed._module is toy.module.lm_head
    assert len(toy.audio_encoder.blocks) == toy.module.config.audio_config.encoder_layers


def test_an_edit_in_a_trace_changes_the_output(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, answer=ANSWER)
    audio = batch.at("audio")
    with torch.no_grad(), toy.trace(batch):
        before = toy.unembed.output[:, -1].save()
    with torch.no_grad(), toy.trace(batch):
        toy.blocks[0].output[audio.rows, audio.cols] = 0
        after = toy.unembed.output[:, -1].save()
    assert (before - after).abs().max() > 1e-3


def test_answers_are_read_at_the_last_position(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, answer=ANSWER)
    answers = toy.answer(batch, ANIMALS)
    with torch.no_grad():
        plain = toy.module(**toy.inputs(batch)).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(answers.log_probs, plain[:, toy.labels(ANIMALS).first], atol=1e-5, rtol=1e-5)
    assert answers.words == [ANIMALS[index] for index in answers.log_probs.argmax(-1)]
    torch.testing.assert_close(answers.probabilities.sum(-1), torch.ones(3))
    assert list(answers.to_frame().columns) == ["answer", *ANIMALS]


def test_free_text_is_what_transformers_generates(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, answer=ANSWER)
    texts = toy.answer(batch, ANIMALS, new_tokens=4).texts
    plain = toy.module.generate(**toy.inputs(batch), max_new_tokens=4, do_sample=False)
    start = batch.inputs["input_ids"].shape[1]
    assert list(texts) == toy.tokenizer.batch_decode(plain[:, start:], skip_special_tokens=True)


def test_whole_labels_are_scored_by_all_their_tokens(toy: LALM, clips: list[Clip]) -> None:
    """Against one full pass per label over prompt plus label, without a cache."""
    batch = toy.prompt(clips, answer=ANSWER)
    labels = toy.labels(["barking dog", "barking cow", "cat"])
    assert max(len(tokens) for tokens in labels.tokens) > 2
    scores = toy.answer(batch, labels, whole=True).log_probs
    inputs = toy.inputs(batch)
    for index, tokens in enumerate(labels.tokens):
        follows = torch.tensor(tokens).expand(len(batch), -1)
        longer = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], follows], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(follows)], 1),
        }
        with torch.no_grad():
            log_probs = toy.module(**longer).logits.log_softmax(-1)[:, -len(tokens) - 1 : -1]
        expected = log_probs.gather(-1, follows[..., None]).sum((1, 2))
        torch.testing.assert_close(scores[:, index], expected, atol=1e-4, rtol=1e-4)


def test_labels_that_collide_are_refused_unless_read_whole(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips[0], answer=ANSWER)
    with pytest.raises(LabelError, match="whole=True"):
        toy.answer(batch, ["barking dog", "barking cow"])
    assert toy.answer(batch, ["barking dog", "barking cow"], whole=True).log_probs.shape == (1, 2)


def test_generation_can_be_called_and_traced(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, answer=ANSWER)
    called = toy.generate(batch, max_new_tokens=3, do_sample=False)
    with toy.generate(batch, max_new_tokens=3, do_sample=False) as tracer:
        traced = tracer.result.save()
    assert torch.equal(called, traced)
    with toy.generate(batch, max_new_tokens=3, do_sample=False) as tracer:
        toy.blocks[-1].output[:, -1] = 0
        edited = tracer.result.save()
    assert not torch.equal(called, edited)


def test_a_bare_array_needs_its_rate_and_is_resampled(toy: LALM) -> None:
    wave = np.sin(np.arange(44_100) / 10).astype(np.float32)
    batch = toy.prompt(wave, answer=ANSWER, rate=44_100)
    assert len(batch.at("audio")) == 25
    with pytest.raises(ValueError, match="needs its rate"):
        toy.prompt(wave, answer=ANSWER)


def test_one_question_per_row(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, question=["One?", "Two?", "Three?"], options=["dog", "cat"], answer=ANSWER)
    assert len(batch.at("Two").row(1)) >= 1
    assert len(batch.at("Two").row(0)) == 0
    assert "Possible options: dog, cat." in batch.positions.row_texts[0].text


def test_the_fingerprint_tells_checkpoints_apart(toy: LALM) -> None:
    before = toy.fingerprint
    weight = toy.ln_final._module.weight
    kept = weight.detach().clone()
    try:
        weight.data[0] += 1
        assert toy.fingerprint != before
    finally:
        weight.data.copy_(kept)
    assert toy.fingerprint == before


def test_what_a_terminal_shows_is_meant_to_be_read(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips, answer=ANSWER)
    assert repr(clips[2]) == "Clip('noise_40000', 2.50 s, 16000 Hz)"
    assert repr(batch) == str(batch)
    shown = repr(toy.answer(batch, ANIMALS))
    assert "tensor" not in shown
    assert all(animal in shown for animal in ANIMALS)


def test_the_repr_says_what_was_loaded(toy: LALM) -> None:
    for piece in ("toy/qwen2-audio", "qwen2_audio", "8 layers", "float32", "sdpa"):
        assert piece in repr(toy)


def test_each_input_goes_to_the_device_of_the_module_that_takes_it(
    toy: LALM, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's hook says where a module runs; here it says that the tower runs elsewhere."""
    elsewhere = SimpleNamespace(execution_device=torch.device("meta"))
    monkeypatch.setattr(toy.module.model.audio_tower, "_hf_hook", elsewhere, raising=False)
    devices = {name: value.device.type for name, value in toy.inputs(toy.prompt(clips, answer=ANSWER)).items()}
    assert devices == {
        "input_ids": "cpu",
        "attention_mask": "cpu",
        "input_features": "meta",
        "feature_attention_mask": "meta",
    }


def test_labels_are_bare_where_no_answer_is_opened(toy: LALM, clips: list[Clip]) -> None:
    opened, unopened = toy.prompt(clips, answer=ANSWER), toy.prompt(clips, question="What animal makes the sound?")
    assert toy.answer(opened, ANIMALS).labels == toy.labels(ANIMALS, "spaced")
    assert toy.answer(unopened, ANIMALS).labels == toy.labels(ANIMALS, "bare")


def test_one_clip_serves_every_question(toy: LALM, clips: list[Clip]) -> None:
    batch = toy.prompt(clips[0], question=["One?", "Two?"])
    assert [prompt.clips for prompt in batch.prompts] == [(clips[0],), (clips[0],)]

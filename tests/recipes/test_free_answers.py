"""Free answers against plain transformers, and labels heard in texts whose meaning is plain to a reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import audio_lens_plugin as alp
from audio_lens_plugin.labels import LabelError
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.free_answers import AnswersResult, free_answers, heard_label, heard_option
from audio_lens_plugin.results import Header, ResultError

ANIMALS = alp.TRACKS["Animal"].labels
EMOTIONS = alp.TRACKS["Emotion"].labels
GENDERS = alp.TRACKS["Gender"].labels
LETTERS = ("A", "B", "I")
BARKS = ("dog", "barking dog", "wild cat")


@pytest.mark.parametrize(
    ("text", "labels", "heard"),
    [
        (" dog", ANIMALS, "dog"),
        ("It is a Dog.", ANIMALS, "dog"),
        ("DOG\n", ANIMALS, "dog"),
        ("the dog's bark", ANIMALS, "dog"),
        ("**dog**", ANIMALS, "dog"),
        ("a dog, yes, a dog", ANIMALS, "dog"),
        ("a dog and a cat", ANIMALS, None),
        ("a wolf", ANIMALS, None),
        ("", ANIMALS, None),
        ("a dogma of cattle", ANIMALS, None),
        ("hotdog", ANIMALS, None),
        ("scatter the cow", ANIMALS, "cow"),
        ("female", GENDERS, "female"),
        ("The speaker is male.", GENDERS, "male"),
        ("male or female", GENDERS, None),
        ("english", ("English", "German"), "English"),
        ("a barking  Dog", BARKS, "barking dog"),
        ("a barking cat", BARKS, None),
        ("wild\ncat", BARKS, "wild cat"),
        ("a barking dog and another dog", BARKS, None),
        ("C++ it is", ("C++", "Java"), "C++"),
        ("B", LETTERS, "B"),
        (" B.", LETTERS, "B"),
        ("(B)", LETTERS, "B"),
        ("B) dog", LETTERS, "B"),
        ("b) dog", LETTERS, "B"),
        ("(b) dog", LETTERS, "B"),
        ("B: dog", LETTERS, "B"),
        ("A", LETTERS, "A"),
        ("(a) a dog", LETTERS, "A"),
        ("the answer is A, a dog", LETTERS, "A"),
        ("a dog", LETTERS, None),
        ("A dog", LETTERS, None),
        ("like a", LETTERS, None),
        ("I think it is a dog", LETTERS, None),
        ("I'm sure: B", LETTERS, "B"),
        ("A or B", LETTERS, None),
        ("A and B are", LETTERS, None),
        ("A orca", LETTERS, None),
        ("A is right", LETTERS, "A"),
        ("B dog", LETTERS, "B"),
        ("I think B is right", LETTERS, "B"),
        ("(A) or (B)", LETTERS, None),
        ("ABBA", LETTERS, None),
    ],
)
def test_a_label_is_heard_where_a_reader_hears_it(text: str, labels: tuple[str, ...], heard: str | None) -> None:
    assert heard_label(text, labels) == heard
    assert heard_label(text, labels[::-1]) == heard


def emotions() -> list[Sample]:
    return list(alp.toy_clips("toy/qwen2-audio", "Emotion").samples("open+is"))


@pytest.fixture(scope="module")
def found(toy: LALM) -> AnswersResult:
    return free_answers(toy, emotions(), EMOTIONS, batch_size=4, form="open+is")


CHOSEN = {
    "(b)": 1,
    "B": 1,
    " b\n": 1,
    "b)": 1,
    "B. ": 1,
    "(b) cat": 1,
    "The answer is C": 2,
    "The answer is C.": 2,
    "B: cat": 1,
    "It is a Dog.": 0,
    "a dog, not a wild dog": None,
    "It is a wild dog": 3,
    "A dog barks": 0,
    "The sound is of a": None,
    "dogs and cats": None,
    "dog or cat": None,
    "(a) or (b)": None,
    "(a) cat": None,
    "(b) cat, not the dog": 1,
    "(x)": None,
    "i.e. a cow": 2,
    "that's d'accord": None,
    "": None,
}


@pytest.mark.parametrize("said", CHOSEN)
def test_a_free_answer_chooses_what_it_names(said: str) -> None:
    assert heard_option(said, ("dog", "cat", "cow", "wild dog")) == CHOSEN[said]


@pytest.mark.parametrize("said", ["e.g. a cow", "E.G. a cow"])
def test_an_abbreviation_is_no_letter(said: str) -> None:
    assert heard_option(said, ("dog", "cat", "cow", "pig", "hen", "frog", "crow")) == 2


def test_options_that_are_no_plain_words_are_heard() -> None:
    assert heard_option("It costs $5 (c. 1900).", ("$4", "$5")) == 1


def test_what_is_said_is_what_transformers_writes_for_each_clip_alone(toy: LALM, found: AnswersResult) -> None:
    for sample, line in zip(emotions(), found.samples.itertuples(), strict=True):
        inputs = toy.inputs(toy.batch([sample.prompt]))
        length = inputs["input_ids"].shape[1]
        ids = toy.module.generate(**inputs, max_new_tokens=10, do_sample=False, num_beams=1)[0, length:]
        logits = toy.module(**inputs).logits[0, -1]
        words = [toy.tokenizer.encode(f" {label}", add_special_tokens=False)[0] for label in EMOTIONS]
        assert (line.sample, line.truth) == (sample.name, sample.label)
        assert line.said == toy.tokenizer.decode(ids, skip_special_tokens=True)
        assert line.answer == EMOTIONS[int(logits[words].argmax())]


def test_a_toy_says_the_right_word_on_most_clips(found: AnswersResult) -> None:
    right = [said.strip() == truth for said, truth in zip(found.samples["said"], found.samples["truth"], strict=True)]
    assert sum(right) > len(right) / 2
    assert found.accuracy == sum(right) / len(right)
    assert f"{len(right)} samples, accuracy {found.accuracy:.3f}" in repr(found)


def test_a_model_that_speaks_of_something_else_is_not_heard(toy: LALM) -> None:
    """The toy, asked for emotions, is given other labels: restricted it must choose, free it names none."""
    samples = [replace(sample, label="B") for sample in emotions()[:3]]
    found = free_answers(toy, samples, toy.labels(["A", "B"], "bare"), batch_size=2)
    assert found.samples["answer"].isin(["A", "B"]).all()
    assert found.samples["heard"].tolist() == [None] * 3
    assert all(text.strip() in EMOTIONS for text in found.samples["said"])
    assert found.accuracy == 0.0


def test_letters_are_heard_by_what_they_stand_for(toy: LALM) -> None:
    """The toy says "fear" or another emotion; which letter that is differs from sample to sample."""
    samples = [replace(sample, label="A") for sample in emotions()[:3]]
    said = free_answers(toy, samples, toy.labels(["A", "B"], "bare")).samples["said"].str.strip()
    options = [(said[0], "loud"), ("loud", said[1]), ("loud", "low")]
    found = free_answers(toy, samples, toy.labels(["A", "B"], "bare"), options=options, batch_size=2)
    assert found.samples["heard"].tolist() == ["A", "B", None]
    assert found.accuracy == 1 / 3
    with pytest.raises(ValueError, match="options of 2 samples for 3 samples"):
        free_answers(toy, samples, ["A", "B"], options=options[:2])


def test_longer_answers_are_asked_for(toy: LALM) -> None:
    sample = alp.toy_clips("toy/qwen2-audio", "Animal").samples("open")[0]
    texts = [free_answers(toy, [sample], ANIMALS, new_tokens=tokens).samples["said"][0] for tokens in (1, 4)]
    assert texts[1].startswith(texts[0])
    assert len(texts[1]) > len(texts[0])


HEADER = Header("free_answers", "model", None, "weights", "float32", "sdpa", "custom", ("dog", "cat"))


def told(*heard: str | None) -> AnswersResult:
    """Clips of dogs."""
    said = [f" It is a\n{word}" for word in heard]
    table = pd.DataFrame({"sample": said, "truth": "dog", "answer": "cat", "said": said})
    return AnswersResult(HEADER, table.assign(heard=pd.Series(heard, dtype="object")))


def test_accuracy_is_counted_by_hand() -> None:
    assert told("dog", "cat", None, "dog", "dog").accuracy == 0.6
    assert "1 without one clear label" in repr(told("dog", "cat", None))


@pytest.mark.parametrize("heard", [("dog", None), (None, None), ("dog", "cat")])
def test_a_result_comes_back_as_it_was_saved(tmp_path: Path, heard: tuple[str | None, ...]) -> None:
    back = AnswersResult.load(told(*heard).save(tmp_path / "saved"))
    assert back.header == HEADER
    assert back.samples["heard"].tolist() == list(heard)
    assert back.samples["said"].tolist() == [f" It is a\n{word}" for word in heard]
    assert list(back.samples.columns) == ["sample", "truth", "answer", "said", "heard"]


def test_parts_join_in_order_and_others_do_not(tmp_path: Path) -> None:
    parts = [told("dog"), AnswersResult.load(told(None).save(tmp_path / "saved")), told("cat")]
    assert AnswersResult.concat(parts).samples["heard"].tolist() == ["dog", None, "cat"]
    other = replace(told("dog"), header=replace(HEADER, form="open"))
    with pytest.raises(ResultError, match="differ in form"):
        AnswersResult.concat([told("dog"), other])


def test_a_killed_run_goes_on_from_what_is_on_disk(
    toy: LALM, found: AnswersResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(batch_size=4, form="open+is", folder=tmp_path / "parts")
    answer, sizes = LALM.answer, []

    def dies_in_the_third(self: LALM, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(batch))
        return answer(self, batch, *args, **kwargs)

    def counts(self: LALM, batch: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(batch))
        return answer(self, batch, *args, **kwargs)

    monkeypatch.setattr(LALM, "answer", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        free_answers(toy, emotions(), EMOTIONS, **settings)
    assert sizes == [4, 4]
    monkeypatch.setattr(LALM, "answer", counts)
    again = free_answers(toy, emotions(), EMOTIONS, **settings)
    assert sizes == [4, 4, 4, 2]
    assert again.header == found.header
    assert again.samples.to_dict("records") == found.samples.to_dict("records")
    free_answers(toy, emotions(), EMOTIONS, new_tokens=3, **settings)
    assert len(sizes) == 8  # other settings, other answers


def test_what_cannot_be_asked_is_refused(toy: LALM) -> None:
    with pytest.raises(ValueError, match="new_tokens=0"):
        free_answers(toy, emotions()[:1], EMOTIONS, new_tokens=0)
    with pytest.raises(ValueError, match="no samples"):
        free_answers(toy, [], EMOTIONS)
    with pytest.raises(LabelError, match="same token"):
        free_answers(toy, emotions()[:1], ["barking dog", "barking cow"])

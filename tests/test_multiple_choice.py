"""Questions of every spelling become the same question; what cannot be read is told with its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from sakura_layout import lay_out

from audio_lens_plugin.audio import AudioError
from audio_lens_plugin.datasets import ClipSet, DatasetError
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.multiple_choice import Question, QuestionSet, questions, sakura_questions, sakura_whole
from audio_lens_plugin.recipes.logit_lens import logit_lens
from audio_lens_plugin.spans import Role

ANIMALS = ("dog", "cat", "cow")


def write_clips(folder: Path, *names: str) -> None:
    """Clips that differ: the first is at level 0.25, the second at 0.5, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names, start=1):
        soundfile.write(folder / name, np.full(4000, place / 4), 8000, subtype="FLOAT")


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    """A row as MMAU writes it."""
    write_clips(tmp_path, "a.wav", "b.wav")
    return {"audio_id": "./a.wav", "question": "What is heard?", "choices": list(ANIMALS), "answer": "cat"}


def ask(folder: Path, *rows: dict[str, Any]) -> dict[str, QuestionSet]:
    (folder / "animals.json").write_text(json.dumps(rows))
    return questions(folder / "animals.json")


def only(sets: dict[str, QuestionSet]) -> QuestionSet:
    (one,) = sets.values()
    return one


def refusal(attempt: Callable, *arguments: Any) -> str:
    with pytest.raises(DatasetError) as refused:
        attempt(*arguments)
    return str(refused.value)


ASKED = {
    "letters": ("What is heard? (A) dog (B) cat (C) cow", "The answer is (", 1),
    "letters+no-audio": ("What is heard? (A) dog (B) cat (C) cow", "The answer is (", 0),
    "asked": ("What is heard? (a) dog (b) cat (c) cow", None, 1),
}


@pytest.mark.parametrize("form", ASKED)
def test_a_question_is_asked_in_its_form(tmp_path: Path, row: dict, form: str) -> None:
    prompt = only(ask(tmp_path, row)).samples(form)[0].prompt
    assert (prompt.words, prompt.answer, len(prompt.clips)) == ASKED[form]


def test_the_forms_are_those_that_can_be_asked(tmp_path: Path, row: dict) -> None:
    assert set(only(ask(tmp_path, row)).forms) == set(ASKED)


def test_an_unknown_form_is_refused_with_those_there_are(tmp_path: Path, row: dict) -> None:
    with pytest.raises(ValueError, match=r"'open\+is'; forms are: letters, asked, letters\+no-audio"):
        only(ask(tmp_path, row)).samples("open+is")


def test_the_label_is_the_letter_of_the_answer(tmp_path: Path, row: dict) -> None:
    animals = only(ask(tmp_path, row))
    assert (animals.labels, animals.samples()[0].label, animals.track.labels) == (("B",), "B", ("A", "B", "C"))


CHOICES = {
    "list": list(ANIMALS),
    "lettered list": ["(A) dog", "(B) cat", "(C) cow"],
    "list with dots": ["A. dog", "B. cat", "C. cow"],
    "spaces": [" dog", "cat ", " cow "],
    "lettered text": "(A) dog (B) cat (C) cow",
    "list as text": "['dog', 'cat', 'cow']",
    "JSON as text": '["dog", "cat", "cow"]',
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_options_of_every_spelling_are_the_same(tmp_path: Path, row: dict, choices: Any) -> None:
    assert only(ask(tmp_path, {**row, "choices": choices})).questions[0].options == ANIMALS


def test_options_in_the_question_are_taken_out_of_it(tmp_path: Path, row: dict) -> None:
    words = "What is (a) sound of? (a) dog (b) cat (or kitten) (c) cow"
    asked = only(ask(tmp_path, {**row, "question": words, "choices": None, "answer": "(c) cow"})).questions[0]
    assert (asked.text, asked.options) == ("What is (a) sound of?", ("dog", "cat (or kitten)", "cow"))


def test_a_published_wording_is_kept(tmp_path: Path, row: dict) -> None:
    words = "Choose (b) or not. (a) dog (b) cat (c) cow"
    asked = only(ask(tmp_path, {**row, "question": words, "choices": None}))
    assert asked.samples("asked")[0].prompt.words == words


@pytest.mark.parametrize("answer", ["cat", " Cat ", "B", "b", "(b)", "b.", "B)", "(b) cat", " (B) CAT", "1", 1])
def test_an_answer_of_every_spelling_is_the_same(tmp_path: Path, row: dict, answer: Any) -> None:
    assert only(ask(tmp_path, {**row, "answer": answer})).labels == ("B",)


@pytest.mark.parametrize(("answer", "letter"), [("A", "B"), ("C", "A"), ("B", "C")])
def test_an_answer_that_is_a_text_and_a_letter_is_the_text(tmp_path: Path, row: dict, answer: str, letter: str) -> None:
    assert only(ask(tmp_path, {**row, "choices": ["C", "A", "B"], "answer": answer})).labels == (letter,)


def test_whole_numbers_beside_a_gap_are_numbers_of_options(tmp_path: Path, row: dict) -> None:
    frame = pd.DataFrame([{**row, "audio_id": str(tmp_path / "a.wav"), "answer": 2.0}])
    assert only(questions(frame)).labels == ("C",)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another answer": ({"answer": "pig"}, "row 2: the answer 'pig' is none of the options ['dog', 'cat', 'cow']"),
    "letter beyond": ({"answer": "(d)"}, "row 2: the answer '(d)' is none of"),
    "number beyond": ({"answer": 3}, "row 2: the answer '3' is none of"),
    "letter of another": ({"answer": "(a) cat"}, "row 2: the answer '(a) cat' is none of"),
    "no answer": ({"answer": None}, "row 2: the answer '' is none of"),
    "one option": ({"choices": ["cat"]}, "row 2: a question has 2 to 26 options, not 1"),
    "27 options": ({"choices": ["cat", *map(str, range(26))]}, "row 2: a question has 2 to 26 options, not 27"),
    "twice the same": ({"choices": ["cat", "dog", "Cat "]}, "row 2: two options are the same: ['cat', 'dog', 'Cat']"),
    "empty option": ({"choices": ["cat", " "]}, "row 2: an option is empty"),
    "no options": ({"choices": None}, "row 2: no options '(a) ... (b) ...' in 'What is heard?'"),
    "no list": ({"choices": 7}, "row 2: the options are no list: 7"),
    "broken list": ({"choices": "['cat', "}, "row 2: the options are no list: \"['cat', \""),
    "no question": ({"question": " "}, "row 2: there is no question"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_question_that_cannot_be_read_is_told_with_its_row(
    tmp_path: Path, row: dict, change: dict, message: str
) -> None:
    told = refusal(ask, tmp_path, row, {**row, **change})
    assert f"{tmp_path / 'animals.json'}: 1 of 2 questions cannot be read:\n  {message}" in told


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("audio_id", "no column of paths; one of file, file_name, path, audio, audio_id is needed, there are question"),
        ("question", "no column of questions; one of question, instruction is needed"),
        ("answer", "no column of answers; one of answer is needed"),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path, row: dict, lost: str, message: str) -> None:
    del row[lost]
    assert message in refusal(ask, tmp_path, row)


def test_all_missing_clips_are_told_at_once(tmp_path: Path, row: dict) -> None:
    told = refusal(ask, tmp_path, {**row, "audio_id": "x.wav"}, row, {**row, "audio_id": "y.wav"})
    assert told.endswith(f"2 of 3 clips are not in {tmp_path}:\n  row 1: x.wav\n  row 3: y.wav")


def test_tasks_and_numbers_of_options_divide_the_questions(tmp_path: Path, row: dict) -> None:
    sets = ask(
        tmp_path,
        {**row, "task": "sound"},
        {**row, "task": "music"},
        {**row, "task": "sound", "choices": ["dog", "cat"]},
        {**row, "task": "sound"},
    )
    sizes = {name: (len(one), len(one.track.labels)) for name, one in sets.items()}
    assert sizes == {"sound (3 options)": (2, 3), "music (3 options)": (1, 3), "sound (2 options)": (1, 2)}


def test_a_table_without_tasks_is_named_after_its_file(tmp_path: Path, row: dict) -> None:
    assert list(ask(tmp_path, row)) == ["animals (3 options)"]


def test_questions_of_different_numbers_of_options_are_no_set() -> None:
    asked = [Question("a.wav", "What?", options, 0) for options in (ANIMALS, ANIMALS[:2])]
    assert "questions of one set have one number of options, not [2, 3]" in refusal(QuestionSet.of, "mixed", asked)


WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("place", ["", "audio"], ids=["beside the table", "in audio/"])
def test_a_table_of_every_kind_is_read(tmp_path: Path, row: dict, kind: str, place: str) -> None:
    write_clips(tmp_path / "mine" / place, "x.wav", "y.wav")
    frame = pd.DataFrame([{**row, "audio_id": "y.wav"}, {**row, "audio_id": "x.wav", "answer": "C"}])
    WRITERS[kind](frame, tmp_path / "mine" / f"t.{kind}")
    read = only(questions(tmp_path / "mine" / f"t.{kind}"))
    levels = [float(sample.prompt.clips[0].waveform[0]) for sample in read.samples()]
    assert (read.labels, read.questions[0].options, levels) == (("B", "C"), ANIMALS, [0.5, 0.25])


def test_a_hugging_face_dataset_is_read(tmp_path: Path, row: dict) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    clip = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}
    table = datasets.Dataset.from_dict(
        {"audio": [clip], "question": [row["question"]], "choices": [row["choices"]], "answer": ["B"]}
    )
    read = only(questions(table.cast_column("audio", datasets.Audio())))
    assert (read.labels, read.names, read.seconds()) == (("B",), ("a.wav",), (0.5,))


def test_a_clip_is_read_only_when_its_sample_is_taken(tmp_path: Path, row: dict) -> None:
    asked = only(ask(tmp_path, row))
    samples, control = asked.samples(), asked.samples("letters+no-audio")
    (tmp_path / "a.wav").unlink()
    assert control[0].prompt.clips == ()
    with pytest.raises(AudioError, match=r"a\.wav: there is no such file"):
        samples[0]


def test_two_questions_about_one_clip_have_two_names_and_one_group(tmp_path: Path, row: dict) -> None:
    asked = only(ask(tmp_path, row, row, {**row, "audio_id": "b.wav"}))
    assert asked.names == ("a.wav", "a.wav #2", "b.wav")
    assert asked.groups() == ("a.wav", "a.wav", "b.wav")


CHANGED: dict[str, dict[str, Any]] = {
    "text": {"text": "What do you hear?"},
    "options": {"options": ("dog", "cat", "pig")},
    "answer": {"answer": 2},
    "wording": {"asked": "What? (a) dog (b) cat (c) cow"},
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_other_words_have_another_digest(tmp_path: Path, row: dict, change: dict) -> None:
    asked = only(ask(tmp_path, row))
    other = QuestionSet.of(asked.name, [replace(asked.questions[0], **change)])
    assert other.digest() != asked.digest()


def test_a_model_answers_questions_in_letters(toy: LALM, tmp_path: Path) -> None:
    """Bare letters, as they stand after the opening bracket: a letter after a space is no token of this vocabulary."""
    asked = sakura_questions(lay_out(tmp_path))["Animal single-hop (4 options)"]
    result = logit_lens(toy, asked.samples()[:2], asked.track.labels)
    assert list(result.samples["truth"]) == list(asked.labels[:2])
    assert result.header.options["label_form"] == "bare"


def test_the_attribute_of_a_question_is_a_word_of_the_opened_answer(toy: LALM, tmp_path: Path, row: dict) -> None:
    asked = only(ask(tmp_path, {**row, "question": "Which answer is right?"}))
    batch = toy.batch([asked.samples()[0].prompt])
    found = batch.at("attribute")
    assert set(batch.positions.roles[found.rows, found.cols].tolist()) == {Role.ANSWER}


@pytest.mark.parametrize(
    ("hop", "first"), [("single", "What animal makes the sound?"), ("multi", "With which letters")]
)
def test_the_published_layout_is_read(tmp_path: Path, hop: Any, first: str) -> None:
    sets = sakura_questions(lay_out(tmp_path), hop)
    options = {name.split()[0]: len(one.track.labels) for name, one in sets.items()}
    assert options == {"Animal": 4, "Emotion": 4, "Gender": 2, "Language": 4}
    assert sets[f"Animal {hop}-hop (4 options)"].questions[0].text.startswith(first)


def test_the_answer_of_a_single_hop_question_is_the_label(tmp_path: Path) -> None:
    folder = lay_out(tmp_path)
    for track in ("Animal", "Gender"):
        labels = pd.read_csv(folder / "data" / track / "metadata.csv")["attribute_label"]
        (asked,) = sakura_questions(folder / "data" / track).values()
        answers = [question.options[question.answer].lower() for question in asked.questions]
        assert answers == list(labels)


def test_a_track_without_questions_of_that_hop_is_refused(tmp_path: Path) -> None:
    path = lay_out(tmp_path) / "data" / "Animal" / "metadata.csv"
    pd.read_csv(path).drop(columns="multi_answer").to_csv(path, index=False)
    assert "one of multi_answer is needed" in refusal(sakura_questions, tmp_path, "multi")


def test_a_whole_sakura_is_its_tracks_and_the_questions_that_are_there(tmp_path: Path) -> None:
    folder = lay_out(tmp_path)
    path = folder / "data" / "Emotion" / "metadata.csv"
    pd.read_csv(path).drop(columns=["single_instruction", "single_answer"]).to_csv(path, index=False)
    kinds = {name: type(one) for name, one in sakura_whole(folder).items()}
    asked = ("Animal single-hop (4 options)", "Gender single-hop (2 options)", "Language single-hop (4 options)")
    assert kinds == dict.fromkeys(("Animal", "Emotion", "Gender", "Language"), ClipSet) | dict.fromkeys(
        asked, QuestionSet
    )


@pytest.mark.parametrize("hop", ["single", "multi"])
def test_every_question_of_the_published_sample_is_read(sakura_sample: Path, hop: Any) -> None:
    sets = sakura_questions(sakura_sample, hop)
    assert sum(map(len, sets.values())) == 52
    for asked in sets.values():
        wordings = [f"{question.text} {' '.join(question.options)}" for question in asked.questions]
        assert all(not wording.count("(a)") for wording in wordings)

"""Labels become tokens in the form the model would say them, and labels it could not tell apart are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from audio_lens_plugin.labels import LabelError, form_after, label_tokens
from audio_lens_plugin.loading import toys

ENGLISH = ["English", "Englishman", "German"]  # the first two begin with the token " English"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoProcessor.from_pretrained(toys()["toy/qwen2-audio"]).tokenizer


@pytest.mark.parametrize(("form", "said"), [("spaced", " {}"), ("bare", "{}")])
@settings(deadline=None)
@given(words=st.lists(st.from_regex(r"[A-Za-z]{1,9}", fullmatch=True), min_size=2, unique_by=str.casefold))
def test_the_tokens_of_a_form_read_as_that_form(tokenizer: Any, form: str, said: str, words: list[str]) -> None:
    labels = label_tokens(tokenizer, words, form)
    assert [tokenizer.decode(ids) for ids in labels.tokens] == [said.format(word) for word in words]


def test_a_word_continues_a_sentence_unless_told_otherwise(tokenizer: Any) -> None:
    assert label_tokens(tokenizer, ["dog", "cat"]) == label_tokens(tokenizer, ["dog", "cat"], "spaced")


def test_a_word_that_opens_a_turn_is_another_token(tokenizer: Any) -> None:
    spaced, bare = (label_tokens(tokenizer, ["dog", "cat"], form).first for form in ("spaced", "bare"))
    assert not set(spaced.tolist()) & set(bare.tolist())


def test_the_first_token_is_what_the_tokenizer_says_first(tokenizer: Any) -> None:
    expected = [tokenizer.encode(" Englishman")[0], tokenizer.encode(" zebra")[0]]
    assert label_tokens(tokenizer, ["Englishman", "zebra"]).first.tolist() == expected


def test_pieces_spell_the_label_token_by_token(tokenizer: Any) -> None:
    assert label_tokens(tokenizer, ENGLISH).pieces == ((" English",), (" English", "m", "an"), (" German",))


def test_spaces_around_a_label_do_not_count(tokenizer: Any) -> None:
    assert label_tokens(tokenizer, [" dog ", "cat\n"]) == label_tokens(tokenizer, ["dog", "cat"])


def test_every_label_is_printed_with_its_pieces_and_ids(tokenizer: Any) -> None:
    labels = label_tokens(tokenizer, ["dog", "Englishman"])
    dog, (man, m, an) = labels.tokens[0][0], labels.tokens[1]
    assert str(labels).splitlines() == [
        f"dog         ' dog'  -> {dog}",
        f"Englishman  ' English' + 'm' + 'an'  -> {man} {m} {an}",
    ]


def test_labels_with_one_first_token_can_still_be_tokenised_whole(tokenizer: Any) -> None:
    assert len(label_tokens(tokenizer, ENGLISH)) == 3


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(r"\['English', 'Englishman'\]", id="the labels that collide"),
        pytest.param(r"Englishman  ' English' \+ 'm' \+ 'an'  -> \d+ \d+ \d+", id="the tokenisation"),
        pytest.param(r"Rename a label, or .*whole=True", id="the way out"),
    ],
)
def test_a_collision_is_refused_and_told_with(tokenizer: Any, told: str) -> None:
    with pytest.raises(LabelError, match=told):
        _ = label_tokens(tokenizer, ENGLISH).first


def test_a_label_that_collides_with_none_is_not_blamed(tokenizer: Any) -> None:
    with pytest.raises(LabelError) as refused:
        _ = label_tokens(tokenizer, ENGLISH).first
    assert "German" not in str(refused.value).splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["dog", "cat", "Dog "], r"two labels are the same word: \['dog', 'cat', 'Dog '\]", id="twice"),
        pytest.param(["dog"], r"at least two labels are needed.*got \['dog'\]", id="one"),
        pytest.param([], r"at least two labels are needed.*got \[\]", id="none"),
        pytest.param(["dog", " "], r"none of them empty; got \['dog', ' '\]", id="blank"),
    ],
)
def test_words_that_are_no_choice_are_refused(tokenizer: Any, words: list[str], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        label_tokens(tokenizer, words)


def test_one_string_is_not_taken_for_a_list_of_letters(tokenizer: Any) -> None:
    with pytest.raises(LabelError, match="dog"):
        label_tokens(tokenizer, "dog")


@pytest.mark.parametrize("word", ["English", " english", "ENGLISH\n"])
def test_a_label_is_found_whatever_its_case_and_spaces(tokenizer: Any, word: str) -> None:
    assert label_tokens(tokenizer, ["German", "English"]).index(word) == 1


def test_an_unknown_label_is_refused_with_those_there_are(tokenizer: Any) -> None:
    with pytest.raises(LabelError, match=r"'wolf' is none of the labels \['dog', 'cat'\]"):
        label_tokens(tokenizer, ["dog", "cat"]).index("wolf")


@pytest.mark.parametrize(
    ("answers", "form"),
    [
        (["It is"], "spaced"),
        (["It is "], "bare"),
        ([None], "bare"),
        (["", None], "bare"),
        (["It is", "A"], "spaced"),
        (["It is ("], "bare"),
    ],
)
def test_a_label_goes_on_from_the_opened_answer(answers: list, form: str) -> None:
    assert form_after(answers) == form


def test_answers_that_ask_for_different_forms_are_refused() -> None:
    with pytest.raises(LabelError, match="some prompts open an answer and some do not"):
        form_after(["It is", None])

"""The sentences that ask for an attribute are AudioLens's own, and a form's name says all about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_lens_plugin.tracks import TRACKS, PromptForm, Track

FORMS = st.builds(PromptForm)
ANIMAL = TRACKS["Animal"]

# AudioLens (arXiv 2506.05140): how the assistant's turn begins.
ANSWERS = {
    ("Animal", "open"): "The sound file's animal",
    ("Animal", "reversed"): "The animal in the sound file",
    ("Emotion", "open"): "The speaker's emotion",
    ("Emotion", "reversed"): "The emotion of the speaker",
    ("Gender", "open"): "The speaker's gender",
    ("Gender", "reversed"): "The gender of the speaker",
    ("Language", "open"): "The speech's spoken language",
    ("Language", "reversed"): "The spoken language of the speech",
}


@settings(deadline=None)
@given(FORMS)
def test_a_forms_name_reads_back_as_the_form(form: PromptForm) -> None:
    assert PromptForm.parse(str(form)) == form


@settings(deadline=None)
@given(FORMS)
def test_every_form_is_listed(form: PromptForm) -> None:
    assert form in PromptForm.all()


def test_no_two_forms_share_a_name() -> None:
    assert len({str(form) for form in PromptForm.all()}) == len(PromptForm.all()) == 24


def test_controls_without_audio_come_last() -> None:
    assert [form.audio for form in PromptForm.all()] == [True] * 12 + [False] * 12


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("open+is", PromptForm()),
        ("open", PromptForm(verb=False)),
        ("reversed+is", PromptForm(order="reversed")),
        ("open+is+question", PromptForm(turn="question")),
        ("open+is+options", PromptForm(turn="options")),
        ("open+is+no-audio", PromptForm(audio=False)),
        ("reversed+options+no-audio", PromptForm("reversed", False, "options", False)),
    ],
)
def test_a_form_is_written_as_documented(text: str, form: PromptForm) -> None:
    assert PromptForm.parse(text) == form


@pytest.mark.parametrize("text", ["", "opened+is", "open+is+", "is+open", "open+is+question+options"])
def test_an_unknown_form_is_refused_with_all_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="unknown prompt form") as refused:
        PromptForm.parse(text)
    assert str(refused.value).endswith(", ".join(map(str, PromptForm.all())))


def test_an_unknown_form_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"'opened\+is'"):
        PromptForm.parse("opened+is")


@pytest.mark.parametrize(("track", "order"), ANSWERS)
@pytest.mark.parametrize(("verb", "end"), [(True, " is"), (False, "")], ids=["is", "no verb"])
def test_the_answer_begins_as_in_the_paper(track: Track | str, order: str, verb: bool, end: str) -> None:
    assert PromptForm(order, verb).answer(TRACKS[track]) == ANSWERS[track, order] + end


@pytest.mark.parametrize(
    ("turn", "question"), [("none", None), ("question", ANIMAL.question), ("options", ANIMAL.question)]
)
def test_a_question_is_asked_only_in_a_form_with_one(turn: str, question: str | None) -> None:
    assert PromptForm(turn=turn).question(ANIMAL) == question


@pytest.mark.parametrize(("turn", "options"), [("none", None), ("question", None), ("options", ANIMAL.labels)])
def test_options_are_named_only_in_a_form_with_them(turn: str, options: tuple | None) -> None:
    assert PromptForm(turn=turn).options(ANIMAL) == options


@settings(deadline=None)
@given(FORMS, st.sampled_from(list(TRACKS.values())))
def test_the_control_without_audio_says_the_same_words(form: PromptForm, track: Track | str) -> None:
    def words(form: PromptForm) -> tuple:
        return form.question(track), form.options(track), form.answer(track)

    assert words(replace(form, audio=False)) == words(replace(form, audio=True))


def test_the_four_tracks_have_their_names() -> None:
    assert {name: track.name for name, track in TRACKS.items()} == {
        name: name for name in ("Animal", "Emotion", "Gender", "Language")
    }


@pytest.mark.parametrize(("track", "count"), [("Animal", 9), ("Emotion", 5), ("Gender", 2), ("Language", 8)])
def test_a_track_has_as_many_answers_as_sakura(track: Track | str, count: int) -> None:
    assert len(set(TRACKS[track].labels)) == len(TRACKS[track].labels) == count


@pytest.mark.parametrize("sentence", ["question", "open", "reversed"])
@pytest.mark.parametrize("track", TRACKS.values(), ids=TRACKS)
def test_every_sentence_names_the_attribute(track: Track | str, sentence: str) -> None:
    assert track.attribute in getattr(track, sentence).split("?")[0].split()


def test_a_sentence_that_does_not_name_the_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match="track Animal: the sentence 'The beast in the file' does not name 'animal'"):
        replace(ANIMAL, reversed="The beast in the file")


@pytest.mark.parametrize("track", TRACKS.values(), ids=TRACKS)
def test_no_sentence_gives_an_answer_away(track: Track | str) -> None:
    said = f"{track.question} {track.open} {track.reversed}".split()
    assert not set(said) & set(track.labels)

"""The shared half of the contract: templates become segments, segments become positions, names become one mapping."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.patch import (
    QUESTION_MARK,
    SYSTEM_MARK,
    Family,
    Heard,
    Segment,
    build_batch,
    fill_template,
    nnsight_names,
)
from audio_lens_plugin.prompts import Prompt, PromptError
from audio_lens_plugin.spans import Role

TEMPLATE = f"<s>{SYSTEM_MARK}</s><a>!<a>!{QUESTION_MARK}</s>"


def processor() -> SimpleNamespace:
    """A tokenizer of letters in which "bc" is one token."""
    vocabulary = {letter: index for index, letter in enumerate("abcd?_")} | {"bc": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")], unk_token="?"))
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_"))


class Letters(Family):
    """A family without audio whose template is "ab" and whose answer follows at once."""

    name, architectures, repo_ids, verified = "letters", (), (), "nothing"
    audio_token = "<a>"
    positions_per_second = None

    def render(self, processor: Any, prompt: Prompt) -> list[Segment]:
        return [Segment("ab", Role.TEMPLATE), Segment(prompt.answer or "", Role.ANSWER)]

    def hear(self, processor: Any, clips: Sequence[Clip], truncate: bool) -> Heard:
        return Heard({}, ())

    def model_class(self) -> Any: ...

    def adapter(self) -> Any: ...

    def verify(self, module: Any, inputs: Any) -> None: ...

    def entrance(self, name: str) -> Any: ...


def test_a_template_is_cut_into_segments_of_one_role() -> None:
    segments = fill_template(TEMPLATE, "<a>", "Be kind.", "What is it?")
    assert "".join(segment.text for segment in segments) == "<s>Be kind.</s><a>!<a>!What is it?</s>"
    assert [segment.text for segment in segments if segment.role is Role.AUDIO] == ["<a>", "<a>"]
    assert [segment.text for segment in segments if segment.role is Role.QUESTION] == ["What is it?"]
    assert [segment.text for segment in segments if segment.role is Role.SYSTEM] == ["Be kind."]


def test_words_that_look_like_marks_stay_words() -> None:
    segments = fill_template(TEMPLATE, "<a>", f"{QUESTION_MARK} <a>", "What?")
    assert [segment.text for segment in segments if segment.role is Role.SYSTEM] == [f"{QUESTION_MARK} <a>"]
    assert sum(segment.role is Role.AUDIO for segment in segments) == 2


def test_a_template_that_loses_the_question_is_refused() -> None:
    with pytest.raises(PromptError, match="0 places for the question"):
        fill_template(f"<s>{SYSTEM_MARK}</s>", "<a>", "Be kind.", "What?")


def test_a_template_that_says_the_system_twice_is_refused() -> None:
    with pytest.raises(PromptError, match="2 places for the system"):
        fill_template(f"{SYSTEM_MARK}{SYSTEM_MARK}", "<a>", "Be kind.", None)


def test_a_template_with_fewer_places_than_clips_is_refused(toy: LALM, clips: list[Clip], monkeypatch) -> None:
    render = type(toy.family).render

    def deaf(self, processor, prompt):
        return [segment for segment in render(self, processor, prompt) if segment.role is not Role.AUDIO]

    monkeypatch.setattr(type(toy.family), "render", deaf)
    with pytest.raises(PromptError, match="0 audio placeholders for 1 clips"):
        toy.prompt(clips[0])


def test_a_token_belongs_where_its_last_character_does() -> None:
    batch = _labelled("cd")
    roles = [Role(role) for role in batch.positions.roles[0].tolist()]
    assert [batch.positions.token_text(0, col) for col in range(3)] == ["a", "bc", "d"]
    assert roles == [Role.TEMPLATE, Role.ANSWER, Role.ANSWER]


def test_rows_are_padded_on_the_left() -> None:
    batch = _labelled("cd", "d")
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    longer = _labelled("cdd", "")
    assert longer.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert [Role(role) for role in longer.positions.roles[1].tolist()] == [
        Role.PAD,
        Role.PAD,
        Role.TEMPLATE,
        Role.TEMPLATE,
    ]


def _labelled(*answers: str):
    prompts = [Prompt(question="?", answer=answer) for answer in answers]
    return build_batch(Letters(), processor(), prompts)


def test_an_empty_batch_is_refused(toy: LALM) -> None:
    with pytest.raises(PromptError, match="at least one prompt"):
        toy.batch([])


def test_many_rows_are_shown_in_part(toy: LALM, clips: list[Clip]) -> None:
    shown = str(toy.prompt([clips[0]] * 11))
    assert shown.count("row ") == 8
    assert shown.endswith("... and 3 more rows")


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (None, None, None),
        ("What?", None, "What?"),
        ("What?", ("a", "b"), "What? Possible options: a, b."),
        (None, ("a", "b"), "Possible options: a, b."),
    ],
)
def test_options_follow_the_question(question, options, words) -> None:
    assert Prompt(question=question, options=options).words == words


def test_one_mapping_names_modules_for_both_libraries() -> None:
    def part(name, **submodules):
        return SimpleNamespace(name=name, submodules=submodules)

    mapping = {
        "blocks": part("model.layers", attn=part("self_attn", q=part("q_proj")), mlp=part("mlp")),
        "unembed": part("lm_head"),
        "tower": part("model.tower", blocks=part("layers", mlp=part(None, out=part("fc2")))),
    }
    assert nnsight_names(mapping) == {
        "model.layers": "blocks",
        "self_attn": "attn",
        "q_proj": "q",
        "lm_head": "unembed",
        "model.tower": "tower",
        "layers": "blocks",
        "fc2": "out",
    }

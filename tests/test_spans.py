"""A position is found by its name: in batches written by hand, and in those that a family makes of real prompts."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.loading import toys
from audio_lens_plugin.patch import build_batch
from audio_lens_plugin.patches.qwen2_audio import FAMILY
from audio_lens_plugin.prompts import Prompt, PromptBatch
from audio_lens_plugin.spans import ROLE_NAMES, Positions, Role, RowText, SpanError

STEP = 0.25  # seconds that one audio position of a batch written by hand hears; exact in binary
Token = tuple[str, str]


def written(*rows: list[Token], attribute: str | None = None, time: bool = True) -> Positions:
    """A left-padded batch from rows of (role or audio[k], text)."""
    width = max(map(len, rows))
    roles = torch.zeros(len(rows), width, dtype=torch.long)
    clips = torch.full((len(rows), width), -1)
    seconds = torch.full((len(rows), width, 2), torch.nan)
    texts = []
    for row, tokens in enumerate(rows):
        text, offsets = "", [(0, 0)] * (width - len(tokens))
        for col, (name, piece) in enumerate(tokens, start=width - len(tokens)):
            roles[row, col] = Role[name.split("[")[0].upper()]
            if name.startswith("audio"):
                clips[row, col] = int(name[6:-1])
                heard = sum(name == other for other, _ in tokens[: col - width + len(tokens)]) * STEP
                seconds[row, col] = torch.tensor([heard, heard + STEP]) if time else torch.nan
            offsets.append((len(text), len(text) + len(piece)))
            text += piece
        texts.append(RowText(text, tuple(offsets), attribute))
    return Positions(roles, clips, seconds, tuple(texts))


def found(positions: Positions, name: str, seconds: tuple[float, float] | None = None) -> list[list[int]]:
    """The positions of each row, counted without its padding."""
    chosen, padding = positions.at(name, seconds), (positions.roles == Role.PAD).sum(dim=1).tolist()
    return [[col - pad for col in chosen.row(row).tolist()] for row, pad in enumerate(padding)]


HEAD = [("template", "<user>Audio cat: "), *[("audio[0]", "<A>")] * 4]
ASKED = [("question", "Which"), ("question", " animal"), ("question", " is"), ("question", " it"), ("question", "?")]
SAID = [("template", "<assistant>"), ("answer", "The"), ("answer", " animal"), ("answer", " is")]
SHORT, LONG = [*HEAD, *SAID], [*HEAD, *ASKED, *SAID]
BATCH = written(SHORT, LONG, attribute="animal")


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([role.name.lower() for role in Role][1:]), min_size=1), min_size=1))
def test_every_position_answers_to_exactly_one_role(rows: list[list[str]]) -> None:
    names = [[("audio[0]" if role == "audio" else role, "x") for role in row] for row in rows]
    positions = written(*names)
    counts = torch.zeros_like(positions.roles)
    for name, role in ROLE_NAMES.items():
        if (positions.roles == role).any():
            chosen = positions.at(name)
            counts[chosen.rows, chosen.cols] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("template", [[0, 5], [0, 10]]),
        ("audio", [[1, 2, 3, 4], [1, 2, 3, 4]]),
        ("all", [[*range(9)], [*range(14)]]),
        ("text", [[0, 5, 6, 7, 8], [0, *range(5, 14)]]),
        ("question", [[], [5, 6, 7, 8, 9]]),
        ("answer", [[6, 7, 8], [11, 12, 13]]),
        ("last", [[8], [13]]),
        ("attribute", [[7], [12]]),
        ("The animal", [[6, 7], [11, 12]]),
        ("is", [[8], [7, 13]]),
        ("nima", [[7], [6, 12]]),
        ("Which", [[], [5]]),
    ],
)
def test_a_name_finds_its_positions(name: str, expected: list) -> None:
    assert found(BATCH, name) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1))
def test_the_last_position_is_the_rows_end_however_it_is_padded(lengths: list[int]) -> None:
    positions = written(*[[("answer", "x")] * length for length in lengths])
    assert found(positions, "last") == [[length - 1] for length in lengths]


def test_the_last_position_comes_before_padding_on_the_right() -> None:
    left = written([("answer", "x")] * 2, [("answer", "x")] * 5)
    right = Positions(left.roles.flip(1), left.clips, left.seconds, left.row_texts)
    assert right.at("last").cols.tolist() == [1, 4]


def test_the_padding_is_found_as_such() -> None:
    assert BATCH.at("pad").row(0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "expected"), [("audio[0]", [[0, 1, 3]]), ("audio[1]", [[2, 4]])])
def test_clips_of_a_row_are_told_apart(name: str, expected: list) -> None:
    positions = written([(f"audio[{clip}]", "<A>") for clip in (0, 0, 1, 0, 1)])
    assert found(positions, name) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param((0.25, 0.5), [2], id="a stretch on the edges takes no neighbour"),
        pytest.param((0.2, 0.5), [1, 2], id="a position heard in part counts"),
        pytest.param((0.26, 0.27), [2], id="a stretch inside one position"),
        pytest.param((0.7, 99.0), [3, 4], id="a stretch past the clip's end"),
    ],
)
def test_seconds_keep_what_overlaps_the_half_open_stretch(
    seconds: tuple[float, float] | float | None, expected: list
) -> None:
    assert found(BATCH, "audio", seconds) == [expected] * 2


@settings(deadline=None)
@given(
    name=st.sampled_from(["audio", "audio[0]"]),
    start=st.decimals(0, "0.9", places=3),
    long=st.decimals("0.01", 9, places=2),
)
def test_a_stretch_is_the_same_in_one_string(name: str, start: Decimal, long: Decimal) -> None:
    end = start + long
    assert found(BATCH, f"{name}@{start}-{end}") == found(BATCH, name, (float(start), float(end)))


def test_a_stretch_of_one_clip_leaves_the_others_out() -> None:
    positions = written([("audio[0]", "<A>"), ("audio[1]", "<A>"), ("audio[1]", "<A>")])
    assert found(positions, "audio[1]@0-0.25") == [[1]]


def test_an_address_in_the_question_is_a_word_like_others() -> None:
    assert found(written([("question", "call"), ("question", " it@0-1")]), "it@0-1") == [[1]]


@settings(deadline=None)
@given(cut=st.floats(0.001, 0.999))
def test_two_stretches_that_meet_cover_the_clip(cut: float) -> None:
    before, after = found(BATCH, "audio", (0.0, cut)), found(BATCH, "audio", (cut, 1.0))
    assert sorted({*before[0], *after[0]}) == [1, 2, 3, 4]


def test_seconds_count_from_the_start_of_their_clip() -> None:
    positions = written([("audio[0]", "<A>"), ("audio[0]", "<A>"), ("audio[1]", "<A>")])
    assert found(positions, "audio", (0.0, 0.25)) == [[0, 2]]


REFUSED = {
    "unknown": (BATCH, "rooster", None, r"no position is 'rooster'\. Roles here: pad, template, audio, question, ans"),
    "further names": (BATCH, "rooster", None, r"further names: last, text, all, attribute, audio\[k\], audio@"),
    "absent role": (BATCH, "system", None, r"no position is 'system'\. Roles here: (?!.*system)"),
    "absent clip": (BATCH, "audio[1]", None, r"no position is 'audio\[1\]'"),
    "silent stretch": (BATCH, "audio", (7.0, 8.5), r"no position is 'audio' between 7 s and 8\.5 s"),
    "backward stretch": (BATCH, "audio", (0.9, 0.4), r"seconds=\(0\.9, 0\.4\) is no stretch.*end must come after"),
    "empty stretch": (BATCH, "audio", (0.4, 0.4), r"seconds=\(0\.4, 0\.4\) is no stretch"),
    "words in time": (BATCH, "answer", (0.0, 1.0), r"only audio positions have seconds; 'answer' has none"),
    "silent stretch in one string": (BATCH, "audio@7-8.5", None, r"no position is 'audio' between 7 s and 8\.5 s"),
    "backward stretch in one string": (BATCH, "audio@0.9-0.4", None, r"seconds=\(0\.9, 0\.4\) is no stretch"),
    "half a stretch": (BATCH, "audio@0.4", None, r"'audio@0\.4' is no stretch of a clip: write.*as in audio@0\.4-0\.9"),
    "stretch of words": (BATCH, "audio[0]@a-b", None, r"is no stretch of a clip: write.*as in audio\[0\]@0\.4-0\.9"),
    "two stretches": (BATCH, "audio@0.4-0.9", (0.4, 0.9), r"'audio@0\.4-0\.9' says its seconds already"),
    "no time": (written(SHORT, time=False), "audio", (0.0, 1.0), r"keep no time: ask for 'audio' without seconds"),
    "undeclared": (written(SHORT), "attribute", None, r"declares its attribute; build it with attribute="),
    "unsaid": (written(SHORT, attribute="mood"), "attribute", None, r"no position is 'attribute'"),
    "template word": (BATCH, "cat", None, r"no position is 'cat'"),
    "audio text": (BATCH, "<A>", None, r"no position is '<A>'"),
    "empty": (BATCH, "", None, r"no position is ''"),
}


@pytest.mark.parametrize(("positions", "name", "seconds", "message"), REFUSED.values(), ids=REFUSED)
def test_a_name_of_nothing_is_refused(
    positions: Positions, name: str, seconds: tuple[float, float] | float | None, message: str
) -> None:
    with pytest.raises(SpanError, match=message):
        positions.at(name, seconds)


def test_the_attribute_of_the_question_is_taken_where_the_answer_does_not_say_it() -> None:
    assert found(written([*HEAD, *ASKED, ("answer", "It is")], attribute="animal"), "attribute") == [[6]]


def test_a_whole_word_is_preferred_to_a_part_of_another() -> None:
    positions = written([("question", "cattle"), ("question", " or"), ("question", " cat")])
    assert found(positions, "cat") == [[2]]


def test_a_whole_word_of_the_template_hides_no_part_of_a_question() -> None:
    positions = written([*HEAD, ("question", "cattle")])  # the template says "cat"
    assert found(positions, "cat") == [[5]]


def test_runs_are_neighbours_of_one_role_and_one_clip() -> None:
    names = ["template", "template", "audio[0]", "audio[0]", "audio[1]", "template", "answer"]
    positions = written([("answer", "x")] * 9, [(name, "x") for name in names])
    runs = positions.runs(1, positions.at("all").row(1))
    assert [run.tolist() for run in runs] == [[2, 3], [4, 5], [6], [7], [8]]
    assert [positions.role_name(1, int(run[0])) for run in runs] == [
        "template", "audio[0]", "audio[1]", "template", "answer"
    ]  # fmt: skip
    assert [run.tolist() for run in positions.runs(1, positions.at("template").row(1))] == [[2, 3], [7]]


def test_no_positions_make_no_runs() -> None:
    assert BATCH.runs(0, BATCH.at("question").row(0)) == []


def test_a_selection_keeps_rows_in_order() -> None:
    assert BATCH.at("is").rows.tolist() == [0, 1, 1]


def test_the_text_of_a_position_is_read_back() -> None:
    assert BATCH.token_text(1, 11) == "The"


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    """Two rows of a real family: no question and 0.5 s; a question and two clips of 1 s and 0.25 s."""
    processor = AutoProcessor.from_pretrained(toys()["toy/qwen2-audio"])
    short, long, tiny = (Clip(np.zeros(size, dtype=np.float32), 16000) for size in (8000, 16000, 4000))
    answer = "The sound file's animal is"
    prompts = [
        Prompt((short,), answer=answer, attribute="animal"),
        Prompt((long, tiny), "Is the file's animal a user or an assistant?", answer=answer, attribute="animal"),
    ]
    return build_batch(FAMILY, processor, prompts)


def spoken(batch: PromptBatch, name: str, row: int) -> str:
    return "".join(batch.positions.token_text(row, col) for col in batch.at(name).row(row).tolist())


def test_both_rows_of_a_real_batch_end_at_its_right_edge(batch: PromptBatch) -> None:
    assert batch.at("last").cols.tolist() == [batch.positions.roles.shape[1] - 1] * 2


@pytest.mark.parametrize(
    ("row", "name", "seconds"), [(0, "audio[0]", 0.5), (1, "audio[0]", 1.0), (1, "audio[1]", 0.25)]
)
def test_a_clip_has_as_many_positions_as_its_seconds(
    batch: PromptBatch, row: int, name: str, seconds: tuple[float, float] | float | None
) -> None:
    assert len(batch.at(name).row(row)) == pytest.approx(25 * seconds, abs=1)


def test_the_seconds_of_a_clip_follow_each_other_without_a_gap(batch: PromptBatch) -> None:
    heard = batch.positions.seconds[1, batch.at("audio[0]").row(1)]
    torch.testing.assert_close(heard.flatten(), torch.arange(26).repeat_interleave(2)[1:-1] / 25)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("system", "You are a helpful assistant."),
        ("question", "Is the file's animal a user or an assistant?"),
        ("answer", "The sound file's animal is"),
        ("attribute", " animal"),
        ("sound", " sound"),
        ("user", "user"),
        ("assistant", " assistant assistant"),
    ],
)
def test_a_name_finds_its_words_in_a_real_prompt(batch: PromptBatch, name: str, text: str) -> None:
    assert spoken(batch, name, 1) == text


def test_the_padding_of_a_real_batch_is_what_the_mask_leaves_out(batch: PromptBatch) -> None:
    assert torch.equal(batch.positions.roles == Role.PAD, batch.inputs["attention_mask"] == 0)

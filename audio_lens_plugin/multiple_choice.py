"""Multiple-choice questions about clips: SAKURA's own, MMAU and its like, or any table of them.

    questions("mmau-test-mini.json")                   sets of questions by name, one per task and number of options
    sakura_questions("SAKURA", hop="multi")            SAKURA's questions as published
    sakura_whole("SAKURA")                             its tracks, and the single-hop questions about them

The answers of a set are letters. A question is asked in one of these forms:

    letters             user: [clip] What is heard? (A) dog (B) cat                assistant: The answer is (
    letters+no-audio    the control: the same words, no clip
    asked               user: [clip] What is heard? (a) dog (b) cat                nothing opened: for free answers

"asked" keeps the wording that was published, with its own list. Chance must be one number in a set, so questions with
different numbers of options, and different tasks, are different sets. The columns of a table:

    column                          what is in it                                                   needed
    file, file_name, path, audio,   the clip; relative paths start at the table's folder or at      one of them
      audio_id                      audio/ in it
    question, instruction           the words; may end in the options: "... (a) dog (b) cat"        one of them
    choices, options                a list of texts, or "(A) dog (B) cat"                           or in the words
    answer                          an option's text, else its letter ("B", "(b)", "b.",            yes
                                    "(b) cat"), else its number counted from 0
    task, category                  divides the questions into sets; the first that is there does   no
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Literal

import pandas as pd

from audio_lens_plugin.audio import as_clip
from audio_lens_plugin.datasets import (
    PATH_COLUMNS,
    ClipSet,
    DatasetError,
    Recordings,
    Samples,
    column_of,
    find_clips,
    hugging_face_clips,
    listed,
    read_table,
    sakura_tracks,
    track_folders,
    words_of,
)
from audio_lens_plugin.prompts import Prompt
from audio_lens_plugin.tracks import TRACKS, Attribute

CLIP_COLUMNS = (*PATH_COLUMNS, "audio_id")
QUESTION_COLUMNS = ("question", "instruction")
OPTION_COLUMNS = ("choices", "options")
SET_COLUMNS = ("task", "category")
LETTERS, NO_AUDIO, ASKED = "letters", "letters+no-audio", "asked"
OPENED = "The answer is ("  # a letter after a space is no single token of many vocabularies
MARK = re.compile(r"\(([A-Za-z])\)")
LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]|$)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question about one clip.

    Attributes:
        source: the clip, as `as_clip` takes it.
        text: the words, without the options.
        options: the possible answers.
        answer: which option is right, counted from 0.
        clip: the clip's file name.
        asked: the published wording with its list; None lists the options after the text as "(a) ... (b) ...".

    Raises:
        DatasetError: options are too few, too many, empty or the same, or the answer is none of them.
    """

    source: Any
    text: str
    options: tuple[str, ...]
    answer: int
    clip: str = "clip"
    asked: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(ascii_uppercase):
            raise DatasetError(f"a question has 2 to {len(ascii_uppercase)} options, not {len(self.options)}")
        if not all(option.strip() for option in self.options):
            raise DatasetError(f"an option is empty: {list(self.options)}")
        if len({option.casefold() for option in self.options}) < len(self.options):
            raise DatasetError(f"two options are the same: {list(self.options)}")
        if not 0 <= self.answer < len(self.options):
            raise DatasetError(f"there is no option {self.answer}: {list(self.options)}")

    @property
    def letter(self) -> str:
        """The right answer's letter."""
        return ascii_uppercase[self.answer]

    def lettered(self, letters: str = ascii_uppercase) -> str:
        """The words with the options after them: ``What is heard? (A) dog (B) cat``."""
        marked = (f"({letter}) {option}" for letter, option in zip(letters, self.options, strict=False))
        return " ".join([self.text, *marked])


@dataclass(frozen=True)
class QuestionSet(Recordings):
    """Questions that all have the same number of options; their labels are letters. Further fields: see `Recordings`.

    Attributes:
        questions: one per row.
    """

    questions: tuple[Question, ...]

    @classmethod
    def of(cls, name: str, questions: Sequence[Question]) -> QuestionSet:
        """A set of questions; rows are named after their clips, with a number where a clip is asked about again.

        Raises:
            DatasetError: there are none, or their numbers of options differ.
        """
        numbers = {len(question.options) for question in questions}
        if len(numbers) != 1:
            raise DatasetError(f"{name}: questions of one set have one number of options, not {sorted(numbers)}.")
        track = Attribute(name, "answer", tuple(ascii_uppercase[: numbers.pop()]))
        names = _numbered([question.clip for question in questions])
        labels = tuple(question.letter for question in questions)
        return cls(name, track, names, [question.source for question in questions], labels, tuple(questions))

    @property
    def forms(self) -> tuple[str, ...]:
        """The prompt forms in which the questions can be asked."""
        return LETTERS, ASKED, NO_AUDIO

    def options(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """What the letters stand for in some of the questions."""
        return [self.questions[index].options for index in indices]

    def samples(self, form: str = LETTERS) -> Samples:
        """Every question in this form; clips are read when a sample is taken.

        Raises:
            ValueError: for a form that there is not; the message lists all forms.
        """
        if form not in self.forms:
            raise ValueError(f"unknown form of questions {form!r}; forms are: {', '.join(self.forms)}")
        return Samples(self, partial(self._ask, form))

    def _ask(self, form: str, index: int) -> Prompt:
        question = self.questions[index]
        clips = () if form == NO_AUDIO else (as_clip(question.source),)
        if form == ASKED:
            return Prompt(clips, question.asked or question.lettered(ascii_lowercase))
        return Prompt(clips, question.lettered(), answer=OPENED, attribute=self.track.attribute)

    def _clip_names(self) -> tuple[str, ...]:
        return tuple(question.clip for question in self.questions)

    def _words(self, index: int) -> tuple[str, ...]:
        question = self.questions[index]
        return (*super()._words(index), question.lettered(), question.asked or "")


def questions(source: Any) -> dict[str, QuestionSet]:
    """Any table of multiple-choice questions, as sets by name: ``music (4 options)``.

    Args:
        source: a JSON (list of objects), JSONL, CSV, TSV or parquet file; a data frame with absolute paths; or a
            Hugging Face dataset with an ``audio`` column. Columns: see the module's text.

    Raises:
        DatasetError: a missing column or file, or questions that cannot be read (with their rows).
    """
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, Path(), "data frame")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _from_frame(read_table(path), path.parent, str(path), path.stem)
    names, clips = hugging_face_clips(source)
    words = {column: words_of(source, column) for column in source.column_names if column != "audio"}
    return _sets(pd.DataFrame(words, dtype=object), names, clips, "dataset", "questions")


def sakura_questions(
    folder: str | os.PathLike[str], hop: Literal["single", "multi"] = "single"
) -> dict[str, QuestionSet]:
    """SAKURA's questions as published, as sets by name: ``Animal single-hop (4 options)``.

    Args:
        folder: one track's folder, or SAKURA with all that are there.
        hop: whether the attribute itself is asked for ("single"), or what follows from it ("multi").

    Raises:
        DatasetError: no track is there, or its questions cannot be read (with their rows).
    """
    folder = Path(folder)
    found: dict[str, QuestionSet] = {}
    for track in [folder] if folder.name in TRACKS else track_folders(folder):
        path = track / "metadata.csv"
        frame = read_table(path)
        words = column_of(frame, (f"{hop}_instruction",), "questions", str(path))
        answers = column_of(frame, (f"{hop}_answer",), "answers", str(path))
        frame = frame.rename(columns={words: "question", answers: "answer"})
        found |= _from_frame(frame, track / "audio", str(path), f"{track.name} {hop}-hop")
    return found


def sakura_whole(folder: str | os.PathLike[str]) -> dict[str, ClipSet | QuestionSet]:
    """What the paper asks: every SAKURA track that is there, and the single-hop questions of those that have them.

    Raises:
        DatasetError: see `datasets.sakura_tracks` and `sakura_questions`.
    """
    found: dict[str, ClipSet | QuestionSet] = dict(sakura_tracks(folder))
    for track in track_folders(Path(folder)):
        if "single_instruction" in read_table(track / "metadata.csv").columns:
            found |= sakura_questions(track)
    return found


def _from_frame(frame: pd.DataFrame, folder: Path, name: str, title: str = "questions") -> dict[str, QuestionSet]:
    files, paths = find_clips(frame[column_of(frame, CLIP_COLUMNS, "paths", name)], folder, name)
    return _sets(frame, files, paths, name, title)


def _sets(
    frame: pd.DataFrame, files: Sequence[str], sources: Sequence[Any], name: str, title: str
) -> dict[str, QuestionSet]:
    """All rows as questions, divided by task and number of options."""
    column_of(frame, QUESTION_COLUMNS, "questions", name)
    column_of(frame, ("answer",), "answers", name)
    divided: dict[str, list[Question]] = {}
    wrong = []
    for row, (cells, file, source) in enumerate(zip(frame.to_dict("records"), files, sources, strict=True), 1):
        try:
            question = _question(cells, file, source)
        except DatasetError as error:
            wrong.append(f"row {row}: {error}")
            continue
        topic = _cell(cells, SET_COLUMNS) or title
        divided.setdefault(f"{topic} ({len(question.options)} options)", []).append(question)
    if wrong:
        raise DatasetError(f"{name}: {len(wrong)} of {len(files)} questions cannot be read:{listed(wrong)}")
    return {key: QuestionSet.of(key, divided[key]) for key in divided}


def _question(cells: Mapping[Any, Any], file: str, source: Any) -> Question:
    words = _cell(cells, QUESTION_COLUMNS)
    if words is None:
        raise DatasetError("there is no question")
    given = _cell(cells, OPTION_COLUMNS)
    if given is None:
        text, options = _lettered(str(words).strip())
        asked: str | None = str(words).strip()
    else:
        text, options, asked = str(words).strip(), _options(given), None
    return Question(source, text, options, _answer(cells["answer"], options), os.path.basename(file), asked)


def _cell(cells: Mapping[Any, Any], columns: Sequence[str]) -> Any:
    """What stands in the first of these columns that is filled; None where none is."""
    for column in columns:
        value = cells.get(column)
        if not _empty(value):
            return value
    return None


def _empty(value: Any) -> bool:
    return (
        value is None or (isinstance(value, float) and pd.isna(value)) or (isinstance(value, str) and not value.strip())
    )


def _options(given: Any) -> tuple[str, ...]:
    """Options given apart from the question: a list, a list written as text, or lettered text."""
    if isinstance(given, str) and not given.strip().startswith("["):
        return _lettered(given.strip())[1]
    try:
        options = ast.literal_eval(given.strip()) if isinstance(given, str) else given
        return _unmarked(tuple(str(option).strip() for option in options))
    except (ValueError, SyntaxError, TypeError) as error:
        raise DatasetError(f"the options are no list: {given!r}") from error


def _unmarked(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options without letters before them, where every one has its own: "(A) dog", "(B) cat"."""
    marks = [LETTER.fullmatch(option) for option in options]
    letters = [mark[1].lower() for mark in marks if mark and mark[2]]
    if letters != list(ascii_lowercase[: len(options)]):
        return options
    return tuple(mark[2].strip() for mark in marks if mark)


def _lettered(words: str) -> tuple[str, tuple[str, ...]]:
    """``What is it? (a) dog (b) cat`` as its text and its options; the last "(a)" begins the list."""
    marks = list(MARK.finditer(words))
    starts = [place for place, mark in enumerate(marks) if mark[1].lower() == "a"]
    if not starts:
        raise DatasetError(
            f"no options '(a) ... (b) ...' in {words!r}, and none in a column {' or '.join(OPTION_COLUMNS)}"
        )
    chain: list[re.Match[str]] = []
    for mark in marks[starts[-1] :]:
        if mark[1].lower() == ascii_lowercase[len(chain) : len(chain) + 1]:
            chain.append(mark)
    ends = [mark.start() for mark in chain[1:]] + [len(words)]
    options = (words[mark.end() : end].strip() for mark, end in zip(chain, ends, strict=True))
    return words[: chain[0].start()].strip(), tuple(options)


def _answer(value: Any, options: tuple[str, ...]) -> int:
    """Which option an answer means: its text, its letter, or its number counted from 0."""
    said = "" if _empty(value) else _plain(value)
    folded = [option.casefold() for option in options]
    if said.casefold() in folded:
        return folded.index(said.casefold())
    letter = LETTER.fullmatch(said)
    if letter:
        place = ascii_lowercase.index(letter[1].lower())
        if place < len(options) and letter[2].strip().casefold() in ("", folded[place]):
            return place
    if said.isdecimal() and int(said) < len(options):
        return int(said)
    raise DatasetError(f"the answer {said!r} is none of the options {list(options)}")


def _plain(value: Any) -> str:
    """A cell as text; a column of whole numbers with gaps is read as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names of rows: a clip's second question is "dog.wav #2"."""
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return tuple(numbered)

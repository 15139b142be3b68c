"""Free answers: what a model says when nobody restricts it to labels.

1. The restricted answer is the label with the highest probability among the labels, as the other recipes read it: it is
   one of them whatever the model would rather say.
2. The free answer is what the model writes after the prompt, greedily: always the likeliest token. Other settings that
   come with a checkpoint (a repetition penalty, say) hold as they do in transformers.
3. A label is heard in a free answer if the text names it and no other label. A text that names none or several is heard
   as none, and counts as wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import pandas as pd

from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.results import Header, load_tables, same_header, save_tables

RECIPE = "free_answers"
WORDS_OF_ONE_LETTER = ("A", "I")
# In a free answer: "(b)", "b)", "B.", "B:", "B,", all of it a letter, or a capital that ends it (an answer that was cut
# off may end in the word "a").
SAID_LETTER = re.compile(r"(?<![\w.'])(?:[A-Za-z](?=[):,]|\.(?!\w))|[A-Z](?=\s*$))|^[a-z]$")


@dataclass(frozen=True, eq=False, repr=False)
class AnswersResult:
    """What a model said.

    Attributes:
        header: where it came from; ``header.labels`` are the labels.
        samples: one line per sample: ``sample``, ``truth``, ``answer`` (restricted to the labels), ``said`` (the text,
            as it was written), ``heard`` (the label that the text names; None where it names none or several).
    """

    header: Header
    samples: pd.DataFrame

    @property
    def accuracy(self) -> float:
        """Share of samples whose free answer names the true label and no other."""
        return float((self.samples["heard"] == self.samples["truth"]).mean())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``free_answers.json`` and ``samples.parquet`` into a folder; `load` reads it back."""
        return save_tables(folder, self.header, {"samples": self.samples})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AnswersResult:
        """Read a saved result.

        Raises:
            ResultError: the folder holds none.
        """
        header, tables = load_tables(folder, RECIPE)
        return cls(header, _with_none(tables["samples"]))

    @classmethod
    def concat(cls, parts: Sequence[AnswersResult]) -> AnswersResult:
        """Join the results of several batches of one experiment.

        Raises:
            ResultError: they come from different experiments.
        """
        header = same_header([part.header for part in parts])
        return cls(header, pd.concat([part.samples for part in parts], ignore_index=True))

    def __repr__(self) -> str:
        silent = int(self.samples["heard"].isna().sum())
        said = f"free answers of {self.header.model}: {len(self.samples)} samples, accuracy {self.accuracy:.3f}, "
        return said + f"{silent} without one clear label, labels {', '.join(self.header.labels)}"


def free_answers(
    lalm: LALM,
    samples: Sequence[Sample],
    labels: Labels | Sequence[str],
    *,
    options: Sequence[Sequence[str]] | None = None,
    new_tokens: int = 10,
    form: str = "custom",
    truncate: bool = False,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> AnswersResult:
    """Let a model answer freely, beside its answer restricted to labels.

    Args:
        labels: the label words, read as what goes on from the opened answer (of the first sample), or their tokens.
        options: for labels that are letters, what each of them stands for, sample by sample: an answer is then heard by
            its letter or by its words (`heard_option`).
        new_tokens: the model writes up to this many.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples that are answered together.
        folder: keep finished batches here and go on from them.

    Raises:
        LabelError: labels that begin with the same token.
        ValueError: no samples, no tokens to write, or options of other samples.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: a free answer takes at least one token.")
    if options is not None and len(options) != len(samples):
        raise ValueError(f"options of {len(options)} samples for {len(samples)} samples.")
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    settings = {"new_tokens": new_tokens, "label_form": labels.form, "truncate": truncate}
    header = header_of(lalm, RECIPE, form, labels.words, settings)

    def compute(part: Sequence[Sample], desk: Desk) -> AnswersResult:
        found = _answer(lalm, part, labels, header)
        desk.advance(len(part), len(part))
        return found

    answers = sweep(
        samples, compute, AnswersResult, header=header, batch_size=batch_size, folder=folder, progress=progress
    )
    return answers if options is None else _heard_by_options(answers, options)


def heard_label(text: str, labels: Sequence[str]) -> str | None:
    """The one label that a text names; None where it names none or several.

    A label is named by its whole words; case does not count. "male" is not in "female", and where one label is part of
    another ("dog", "barking dog"), the longer one is heard. What the text says of a label is not understood: "not
    happy" names "happy".

    A label of one letter must be a capital ("B", "B.", "the answer is B") or stand before a bracket ("(b)", "b) dog").
    "A" and "I" are English words, too: as labels, no other word than "or", "and" or "is" may follow them without a mark
    between, since "A dog" and "I think" name no option.

    Args:
        text: what was said.
        labels: the labels to listen for.
    """
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = "|".join(f"({_naming(label)})" for label in longest_first)
    named = {longest_first[match.lastindex - 1] for match in re.finditer(pattern, text) if match.lastindex}
    return named.pop() if len(named) == 1 else None


def heard_option(text: str, options: Sequence[str]) -> int | None:
    """Which option a freely generated text chooses: by its letter, else by naming it in whole words.

    Args:
        text: what was said: "(b)", "B.", "b)", "B", "It is a dog."
        options: the possible answers, in the order of their letters.

    Returns:
        The option counted from 0; None where the text chooses none or several, or a letter and another's name.
    """
    named = _named(text, options)
    places = {ascii_lowercase.index(letter.lower()) for letter in SAID_LETTER.findall(text.strip())}
    lettered = {place for place in places if place < len(options)}
    chosen = lettered or named
    if len(chosen) != 1 or (named and not chosen <= named):
        return None
    return next(iter(chosen))


def _naming(label: str) -> str:
    """A regular expression, without groups, for the ways in which a text may name a label."""
    if len(label) == 1:
        letter = re.escape(label.upper())
        begins_a_phrase = r"['’]|\s+(?!(?:or|and|is)\b)\w"
        follows = rf"\w|{begins_a_phrase}" if letter in WORDS_OF_ONE_LETTER else r"\w"
        return rf"(?<!\w)(?:{letter}(?!{follows})|(?i:{letter})\))"
    words = r"\s+".join(map(re.escape, label.split()))
    return rf"(?<!\w)(?i:{words})(?!\w)"


def _named(text: str, options: Sequence[str]) -> set[int]:
    """The options named in a text; "wild cat" does not name "cat"."""
    rest, found = text.casefold(), set()
    for place in sorted(range(len(options)), key=lambda place: -len(options[place])):
        words = re.escape(options[place].strip().casefold())
        rest, times = re.subn(rf"(?<!\w){words}(?!\w)", "\n", rest)
        if times:
            found.add(place)
    return found


def _answer(lalm: LALM, samples: Sequence[Sample], labels: Labels, header: Header) -> AnswersResult:
    batch = lalm.batch([sample.prompt for sample in samples], header.options["truncate"])
    answers = lalm.answer(batch, labels, new_tokens=header.options["new_tokens"])
    texts = list(answers.texts or ())
    table = pd.DataFrame(
        {
            "sample": [sample.name for sample in samples],
            "truth": [labels.words[labels.index(sample.label)] for sample in samples],
            "answer": answers.words,
            "said": texts,
            "heard": [heard_label(text, labels.words) for text in texts],
        }
    )
    return AnswersResult(header, _with_none(table))


def _heard_by_options(answers: AnswersResult, options: Sequence[Sequence[str]]) -> AnswersResult:
    places = [heard_option(text, of_sample) for text, of_sample in zip(answers.samples["said"], options, strict=True)]
    heard = [None if place is None else answers.header.labels[place] for place in places]
    return AnswersResult(answers.header, _with_none(answers.samples.assign(heard=pd.Series(heard, dtype="object"))))


def _with_none(samples: pd.DataFrame) -> pd.DataFrame:
    """The table with None, and no other mark, where no label was heard; of one type, whatever was heard."""
    heard = [None if pd.isna(label) else label for label in samples["heard"]]
    return samples.assign(heard=pd.Series(heard, index=samples.index, dtype="object"))

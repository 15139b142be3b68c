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

import pandas as pd

from audio_lens_plugin.labels import Labels
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.engine import Desk, header_of, labels_for, sweep
from audio_lens_plugin.results import Header, load_tables, same_header, save_tables

RECIPE = "free_answers"
WORDS_OF_ONE_LETTER = ("A", "I")


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
        new_tokens: the model writes up to this many.
        form: the prompt form, for the header.
        truncate: cut clips of samples that are longer than the model's window, with a warning.
        batch_size: samples that are answered together.
        folder: keep finished batches here and go on from them.

    Raises:
        LabelError: labels that begin with the same token.
        ValueError: no samples, or no tokens to write.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: a free answer takes at least one token.")
    labels = labels_for(lalm, labels, [sample.prompt for sample in samples[:1]])
    options = {"new_tokens": new_tokens, "label_form": labels.form, "truncate": truncate}
    header = header_of(lalm, RECIPE, form, labels.words, options)

    def compute(part: Sequence[Sample], desk: Desk) -> AnswersResult:
        found = _answer(lalm, part, labels, header)
        desk.advance(len(part), len(part))
        return found

    return sweep(
        samples, compute, AnswersResult, header=header, batch_size=batch_size, folder=folder, progress=progress
    )


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


def _naming(label: str) -> str:
    """A regular expression, without groups, for the ways in which a text may name a label."""
    if len(label) == 1:
        letter = re.escape(label.upper())
        begins_a_phrase = r"['’]|\s+(?!(?:or|and|is)\b)\w"
        follows = rf"\w|{begins_a_phrase}" if letter in WORDS_OF_ONE_LETTER else r"\w"
        return rf"(?<!\w)(?:{letter}(?!{follows})|(?i:{letter})\))"
    words = r"\s+".join(map(re.escape, label.split()))
    return rf"(?<!\w)(?i:{words})(?!\w)"


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


def _with_none(samples: pd.DataFrame) -> pd.DataFrame:
    """The table with None, and no other mark, where no label was heard; of one type, whatever was heard."""
    heard = [None if pd.isna(label) else label for label in samples["heard"]]
    return samples.assign(heard=pd.Series(heard, index=samples.index, dtype="object"))

"""Label words become token ids, and the tokenisation is shown.

A model is asked which of a few words it would say next. A word is read by its *first token*, so two things must be
right: the form (after "...animal is" the next token is " dog", with its leading space, not "dog"), and no two labels
may begin with the same token, or the comparison is silently a tie. The second is refused, the first is shown:

    >>> print(label_tokens(tokenizer, ["dog", "cat"]))          # doctest: +SKIP
    dog   ' dog'  -> 5562
    cat   ' cat'  -> 8251
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import whitespace
from typing import Any, Literal

import torch
from jaxtyping import Int

Form = Literal["spaced", "bare"]
BEFORE_BARE = (*whitespace, "(")


class LabelError(ValueError):
    """Labels that cannot be told apart, or are none."""


@dataclass(frozen=True)
class Labels:
    """Labels and their tokens.

    Attributes:
        words: the labels as the user wrote them.
        form: ``spaced`` (" dog": the word continues a sentence) or ``bare`` ("dog": the word opens a turn).
        tokens: all token ids of each label in that form.
        pieces: the same tokens as text.
    """

    words: tuple[str, ...]
    form: Form
    tokens: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.words)

    @property
    def first(self) -> Int[torch.Tensor, " labels"]:
        """The first token id of each label.

        Raises:
            LabelError: two labels begin with the same token.
        """
        self.check_first()
        return torch.tensor([ids[0] for ids in self.tokens])

    def check_first(self) -> None:
        """Refuse labels that first tokens cannot tell apart.

        Raises:
            LabelError: two labels begin with the same token.
        """
        owners: dict[int, list[str]] = defaultdict(list)
        for word, ids in zip(self.words, self.tokens, strict=True):
            owners[ids[0]].append(word)
        clashes = [words for words in owners.values() if len(words) > 1]
        if clashes:
            raise LabelError(
                f"labels begin with the same token and cannot be told apart by it: {clashes}.\n{self}\n"
                "Rename a label, or read whole labels: whole=True."
            )

    def index(self, word: str) -> int:
        """Which label ``word`` is; case and surrounding spaces do not count.

        Raises:
            LabelError: it is none of them.
        """
        folded = [label.casefold() for label in self.words]
        if word.strip().casefold() not in folded:
            raise LabelError(f"{word!r} is none of the labels {list(self.words)}.")
        return folded.index(word.strip().casefold())

    def __str__(self) -> str:
        width = max(len(word) for word in self.words)
        return "\n".join(
            f"{word:<{width}}  {' + '.join(repr(piece) for piece in pieces)}  -> {' '.join(map(str, ids))}"
            for word, pieces, ids in zip(self.words, self.pieces, self.tokens, strict=True)
        )


def label_tokens(tokenizer: Any, words: Sequence[str], form: Form = "spaced") -> Labels:
    """Tokenise label words in one form.

    Raises:
        LabelError: fewer than two labels, an empty one, or two that are the same word.
    """
    if isinstance(words, str):
        raise LabelError(f"labels are a list of words, not the one string {words!r}.")
    cleaned = tuple(word.strip() for word in words)
    if len(cleaned) < 2 or not all(cleaned):
        raise LabelError(f"at least two labels are needed, none of them empty; got {list(words)}.")
    if len({word.casefold() for word in cleaned}) < len(cleaned):
        raise LabelError(f"two labels are the same word: {list(words)}.")
    texts = [f" {word}" if form == "spaced" else word for word in cleaned]
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    pieces = tuple(tuple(tokenizer.decode([token]) for token in tokens) for tokens in ids)
    return Labels(cleaned, form, tuple(ids), pieces)


def form_after(answers: Iterable[str | None]) -> Form:
    """The form in which a label goes on from opened answers: spaced after words, bare where nothing is opened and after
    an opening bracket ("The answer is (").

    Raises:
        LabelError: the answers ask for different forms.
    """
    forms: set[Form] = {"spaced" if answer and not answer.endswith(BEFORE_BARE) else "bare" for answer in answers}
    if len(forms) > 1:
        raise LabelError(
            "some prompts open an answer and some do not: labels would be spaced for some and bare for others. "
            "Run them apart, or choose a form: lalm.labels(words, form)."
        )
    return forms.pop() if forms else "spaced"

"""How one unit is computed: each experiment is a recipe with its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.paper.design import CLIP, ENHANCEMENT, FREE, KNOCKOUT, LENS, PATCHING, Settings, Subject, Unit
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.activation_patching import PatchResult, activation_patching
from audio_lens_plugin.recipes.attention_knockout import KnockoutResult, knockout_table
from audio_lens_plugin.recipes.engine import Part
from audio_lens_plugin.recipes.enhancement import EnhanceResult, enhance_grid
from audio_lens_plugin.recipes.free_answers import AnswersResult, free_answers
from audio_lens_plugin.recipes.logit_lens import LensResult, logit_lens
from audio_lens_plugin.recipes.pairs import pairs_from


@dataclass(frozen=True)
class Task:
    """What an experiment is given: the model, a batch of samples, and what they are asked.

    Attributes:
        options: what the labels of each sample stand for, where they are letters.
    """

    lalm: LALM
    samples: Sequence[Sample]
    unit: Unit
    subject: Subject
    settings: Settings
    options: Sequence[Sequence[str]] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """The keywords that all recipes have."""
        form = self.unit.form if self.unit.control == CLIP else f"{self.unit.form} ({self.unit.control})"
        return {"form": form, "truncate": self.settings.truncate, "batch_size": self.settings.batch_size}

    def has(self, span: str) -> bool:
        """Whether the prompts have a position of this name."""
        prompt = self.samples[0].prompt
        return {"attribute": prompt.attribute, "question": prompt.words, "audio": prompt.clips or None}[
            span
        ] is not None


def _lens(task: Task) -> LensResult:
    # What stands at audio positions does not depend on the words after them: they are read in one form alone.
    first = (task.unit.form, task.unit.control) == (task.subject.forms[0], CLIP)
    spans = [span for span in ("attribute", "question", *(["audio"] if first else [])) if task.has(span)]
    return logit_lens(task.lalm, task.samples, task.subject.labels, ["last", *spans], **task.common)


def _free(task: Task) -> AnswersResult:
    return free_answers(
        task.lalm,
        task.samples,
        task.subject.labels,
        options=task.options,
        new_tokens=task.settings.new_tokens,
        **task.common,
    )


def _knockout(task: Task) -> KnockoutResult:
    cut: dict[str, Any] = {"window": task.settings.window, "seed": task.settings.seed}
    return knockout_table(task.lalm, task.samples, task.subject.labels, **cut, **task.common)


def _patching(task: Task) -> PatchResult:
    spans = [span for span in ("audio", "question", "attribute") if task.has(span)]
    pairs = pairs_from(task.samples, "silence", seed=task.settings.seed)
    positions = [*spans, "answer", "last", "all"]
    # Silence may be transcribed into another number of words, where a model reads a transcript.
    settings = {"positions": positions, "how": "resample", **task.common}
    return activation_patching(task.lalm, pairs, task.subject.labels, **settings)


def _enhancement(task: Task) -> EnhanceResult:
    return enhance_grid(task.lalm, task.samples, task.subject.labels, **task.common)


KINDS: dict[str, tuple[type[Any], Callable[[Task], Part]]] = {
    LENS: (LensResult, _lens),
    FREE: (AnswersResult, _free),
    KNOCKOUT: (KnockoutResult, _knockout),
    PATCHING: (PatchResult, _patching),
    ENHANCEMENT: (EnhanceResult, _enhancement),
}
"""What each experiment returns, and how it is run."""

"""What the paper says, and whether it holds here: each finding is judged by a run's tables, by a rule told in words.

A verdict is about one model and its clips. ``cannot be told`` means that intervals or tests leave it open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from audio_lens_plugin.paper.design import CLIP

Verdict = Literal["held", "did not hold", "cannot be told"]
HELD: Verdict = "held"
NOT: Verdict = "did not hold"
OPEN: Verdict = "cannot be told"
SIGNIFICANT = 0.05
LITTLE = 0.5

PUBLISHED: dict[str, dict[str, float]] = {
    "DeSTA2": {"Gender": 0.884, "Language": 0.942, "Emotion": 0.348, "Animal": 0.344},
    "Qwen-Audio-Chat": {"Gender": 0.496, "Language": 0.876, "Emotion": 0.632, "Animal": 0.922},
    "Qwen2-Audio": {"Gender": 0.880, "Language": 0.838, "Emotion": 0.642, "Animal": 0.888},
}
"""Accuracies on SAKURA's single-hop questions, as published with it (github ckyang1124/SAKURA), 500 clips a track."""


@dataclass(frozen=True)
class Judgement:
    """One claim of the paper and what became of it.

    Attributes:
        name: a few words.
        claim: in the paper's sense.
        verdict: ``held``, ``did not hold``, or ``cannot be told``.
        measured: the numbers it was judged by.
        rule: how.
        paper: the paper's own number, or that it is not public.
    """

    name: str
    claim: str
    verdict: Verdict
    measured: str
    rule: str
    paper: str


def judge(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> list[Judgement]:
    """Every finding of AudioLens (arXiv 2506.05140, as far as it is public) against the tables of a run.

    Args:
        tables: see `tables.TABLES`.
        forms: the prompt form that is judged, by track.
    """
    return [finding(tables, forms) for finding in (_rises, _falls, _correlates, _little, _reads_audio, _enhances)]


def published(model: str) -> dict[str, float]:
    """The published accuracies of the model of this name, if there are any."""
    if model.startswith("toy/"):
        return {}
    return next((numbers for name, numbers in PUBLISHED.items() if name.lower() in model.lower()), {})


def _rises(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    def of_track(part: pd.DataFrame) -> tuple[Verdict, str]:
        first, last = part[part["layer"] == 1].iloc[0], part.iloc[-1]
        said = f"{first['probability']:.2f} after block 1, {last['probability']:.2f} at the end"
        return _above(last["low"], first["high"], last["high"], first["low"]), said

    return Judgement(
        "Right answers grow",
        "For clips that are answered rightly, information about the attribute rises with depth.",
        *_over_tracks(tables, forms, "success", of_track),
        "p(true label) at the last position: the interval at the last layer lies above that after the first block.",
        "Curves are drawn in the paper; their numbers are not public.",
    )


def _falls(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    def of_track(part: pd.DataFrame) -> tuple[Verdict, str]:
        peak, last = part.nlargest(1, "probability").iloc[0], part.iloc[-1]
        said = f"peak {peak['probability']:.2f} after layer {peak['layer']:.0f}, {last['probability']:.2f} at the end"
        if peak["layer"] == last["layer"]:
            return NOT, said
        return HELD if peak["low"] > last["high"] else OPEN, said

    return Judgement(
        "Wrong answers were closer",
        "For clips that are answered wrongly, it peaks on the way and falls towards the end.",
        *_over_tracks(tables, forms, "failure", of_track),
        "p(true label) at the last position: the interval at the peak lies above that at the last layer; it did not "
        "fall where the peak is the last layer. The peak is the highest of many layers, which flatters it.",
        "Curves are drawn in the paper; their numbers are not public.",
    )


def _correlates(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    table = tables["correlation"]
    line = table[(table["measure"] == "pearson") & ~table["of"].str.contains("within") & (table["of"] != "track")].iloc[
        0
    ]
    sure = line["p"] < SIGNIFICANT
    verdict: Verdict = OPEN
    if sure:
        verdict = HELD if line["value"] < 0 else NOT
    return Judgement(
        "The earlier, the better",
        "The earlier a model resolves the attribute, the better it answers: critical layer and accuracy correlate "
        "negatively.",
        verdict,
        f"Pearson's r = {line['value']:.2f} (p = {line['p']:.2g}) over {line['points']} points, one per track and form",
        f"the sign of r where its permutation test gives p < {SIGNIFICANT}. Forms of a track share its clips, so the "
        "test flatters.",
        "A negative correlation; its value is not public.",
    )


def _little(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    found: dict[str, tuple[Verdict, str]] = {}
    for track, form in forms.items():
        table = tables["attribute_share"]
        mine = table[(table["track"] == track) & (table["form"] == form) & (table["span"] == "attribute")]
        for _, line in mine.iterrows():
            verdict = _above(LITTLE, line["high"], LITTLE, line["low"])
            found[track] = (verdict, f"{line['share']:.2f} ({line['low']:.2f} to {line['high']:.2f})")
    return Judgement(
        "Words hold little",
        "Positions of the text that name the attribute hold little of it.",
        *_together(found, "share of the information at the last position"),
        f"information at the word that names the attribute, above chance and summed over layers, is less than "
        f"{LITTLE:.0%} of that at the last position, with its whole interval.",
        "Not public as a number.",
    )


def _reads_audio(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    table = tables["knockout"]
    found: dict[str, tuple[Verdict, str]] = {}
    for track in forms:
        mine = table[(table["track"] == track) & (table["keys"] == "audio") & (table["cut"] == "keys")]
        worst = mine.sort_values("probability", kind="stable").iloc[0]
        sure = ((mine["p_of_all"] < SIGNIFICANT) & (mine["probability"] < 0)).any()
        said = f"{worst['probability']:+.2f} of p(truth), {worst['queries']} around layer {worst['layer']:.0f}"
        found[track] = (HELD if sure else OPEN, said)
    return Judgement(
        "The audio is read",
        "Instead, the model reads the audio positions.",
        *_together(found, "largest loss where a position cannot read the audio"),
        f"some window of layers in which a position cannot read the audio costs p(truth), with p < {SIGNIFICANT} of "
        "all windows together. This is causal; the paper's evidence is the lens.",
        "Not public as a number.",
    )


def _enhances(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    found: dict[str, tuple[Verdict, str]] = {}
    for _, line in tables["enhancement"].iterrows():
        sure = line["gain_low"] > 0 and line["p_of_all"] < SIGNIFICANT
        verdict: Verdict = HELD if sure else NOT if line["gain_high"] < 0 else OPEN
        found[line["track"]] = (verdict, f"{line['gain']:+.3f} ({line['gain_low']:+.3f} to {line['gain_high']:+.3f})")
    return Judgement(
        "Enhancement helps",
        "Adding an early, attribute-rich layer to a later one makes the model answer better, without training.",
        *_together(found, "gain in accuracy on held-out clips"),
        "the interval of the gain on held-out clips lies above 0, and McNemar's test, corrected for all tracks, gives "
        f"p < {SIGNIFICANT}. The setting was chosen on other clips.",
        "16.3 % better, relatively (one reader's notes; which layers, and the accuracies, are not public).",
    )


def _above(low: float, other_high: float, high: float, other_low: float) -> Verdict:
    """Whether one interval lies above another; ``did not hold`` where it lies below it."""
    if low > other_high:
        return HELD
    return NOT if high < other_low else OPEN


def _over_tracks(
    tables: Mapping[str, pd.DataFrame],
    forms: Mapping[str, str],
    outcome: str,
    of_track: Callable[[pd.DataFrame], tuple[Verdict, str]],
) -> tuple[Verdict, str]:
    table = tables["curves"]
    found: dict[str, tuple[Verdict, str]] = {}
    chosen = (table["span"] == "last") & (table["control"] == CLIP) & (table["outcome"] == outcome)
    for track, form in forms.items():
        part = table[chosen & (table["track"] == track) & (table["form"] == form)]
        found[track] = of_track(part) if part["samples"].iloc[0] else (OPEN, "no such clips")
    return _together(found, "p(true label)")


def _together(found: Mapping[str, tuple[Verdict, str]], what: str) -> tuple[Verdict, str]:
    """One verdict of several tracks: that of more than half of them, unless another track says the opposite."""
    counts = Counter(verdict for verdict, _ in found.values())
    said = f"{what}: " + "; ".join(f"{track} {words} [{verdict}]" for track, (verdict, words) in found.items())
    return _majority(counts, len(found)), said


def _majority(counts: Mapping[Verdict, int], tracks: int) -> Verdict:
    sides: Sequence[tuple[Verdict, Verdict]] = ((HELD, NOT), (NOT, HELD))
    for verdict, opposite in sides:
        if counts.get(verdict, 0) * 2 > tracks and not counts.get(opposite, 0):
            return verdict
    return OPEN

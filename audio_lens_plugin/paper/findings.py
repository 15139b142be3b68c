"""What the paper says, and whether it holds here: each finding is judged by a run's tables, by a rule told in words.

A verdict is about one model and its clips. ``cannot be told`` means that intervals or tests leave it open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from audio_lens_plugin.report import interval, p_value

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


CONTROL = (
    "The control cuts as many other keys, drawn by chance. Where audio positions outnumber the words it may cost more "
    "than the cut: there are fewer other keys, and it takes nearly all of the text (blocked counts the pairs cut)."
)

Found = tuple[Verdict, dict[str, Any]]
"""What became of a claim for one track, and the numbers that say so, by their names."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """One claim of the paper and what became of it.

    Attributes:
        name: a few words.
        claim: in the paper's sense.
        verdict: ``held``, ``did not hold``, or ``cannot be told``.
        here: what it came to, in a few words with their number.
        tracks: the numbers it was judged by, one line per track; empty where tracks are judged together.
        rule: how.
        paper: the paper's own number, or that it is not public.
    """

    name: str
    claim: str
    verdict: Verdict
    here: str
    tracks: pd.DataFrame
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


def wording(forms: Mapping[str, str]) -> str:
    """A caution about the paper's prompt forms, where these are shown."""
    if not any("is" in form.split("+") for form in forms.values()):
        return ""
    return (
        ' Forms without "is" read the labels a word too early ("The gender" goes on with "is"), so their numbers are '
        "lower for a reason of wording."
    )


def _rises(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    def of_track(part: pd.DataFrame) -> Found:
        first = part.iloc[0]
        rise = interval(-first["change"], -first["high"], -first["low"], sign="+")
        verdict = _above(0.0, first["high"], 0.0, first["low"]) if first["p"] < SIGNIFICANT else OPEN
        return verdict, {"p(true label) at the end minus after block 1": rise, "p": p_value(first["p"])}

    return Judgement(
        "Right answers grow",
        "For clips that are answered rightly, information about the attribute rises with depth.",
        *_over_tracks(tables, forms, "success", of_track),
        "p(true label) at the last position, clip by clip: the interval of the change from the first block to the last "
        f"lies above 0, with p < {SIGNIFICANT} (signs flipped by clip).",
        "Curves are drawn in the paper; their numbers are not public.",
    )


def _falls(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    def of_track(part: pd.DataFrame) -> Found:
        sure = part[(part["p_of_all"] < SIGNIFICANT) & (part["change"] > 0)]
        peak = (part if sure.empty else sure).nlargest(1, "change").iloc[0]
        numbers = {
            "highest p(true label) minus at the end": interval(peak["change"], peak["low"], peak["high"], sign="+"),
            "after layer": f"{peak['layer']:.0f}",
            "p of all layers": p_value(peak["p_of_all"]),
        }
        if peak["change"] <= 0:
            return NOT, numbers
        return OPEN if sure.empty else HELD, numbers

    return Judgement(
        "Wrong answers were closer",
        "For clips that are answered wrongly, that information peaks on the way and falls towards the end.",
        *_over_tracks(tables, forms, "failure", of_track),
        "p(true label) at the last position, clip by clip: that at some layer lies above that at the last, with "
        f"p < {SIGNIFICANT} of all layers together (signs flipped by clip); it did not fall where none lies above.",
        "Curves are drawn in the paper; their numbers are not public.",
    )


def _correlates(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    table = tables["correlation"]
    line = table[(table["measure"] == "pearson") & ~table["of"].str.contains("within") & (table["of"] != "track")].iloc[
        0
    ]
    verdict: Verdict = OPEN
    if line["p"] < SIGNIFICANT:
        verdict = HELD if line["value"] < 0 else NOT
    return Judgement(
        "The earlier, the better",
        "The earlier a model resolves the attribute, the better it answers.",
        verdict,
        pearson(line),
        pd.DataFrame(),
        f"the sign of r, over one point per track and form, where its permutation test gives p < {SIGNIFICANT}. Forms "
        f"of a track share its clips, so the test flatters.{wording(forms)}",
        "A negative correlation; its value is not public.",
    )


def pearson(line: pd.Series) -> str:
    """A line of the table of correlations in words."""
    if pd.isna(line["value"]):
        return f"no correlation of critical layer and accuracy can be computed from {line['points']:.0f} points"
    number = f"{line['value']:.2f} (p = {p_value(line['p'])}, {line['points']:.0f} points)"
    return f"Pearson's r of critical layer and accuracy is {number}"


def _little(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    found: dict[str, Found] = {}
    for track, form in forms.items():
        table = tables["attribute_share"]
        mine = table[(table["track"] == track) & (table["form"] == form) & (table["span"] == "attribute")]
        for _, line in mine.iterrows():
            verdict = _above(LITTLE, line["high"], LITTLE, line["low"])
            share = interval(line["share"], line["low"], line["high"])
            found[track] = (verdict, {"share of the information at the last position": share})
    return Judgement(
        "Words hold little",
        "Positions of the text that name the attribute hold little of it.",
        *_together(found),
        f"information at the word that names the attribute, above chance and summed over layers, is less than "
        f"{LITTLE:.0%} of that at the last position, with its whole interval.",
        "Not public as a number.",
    )


def _reads_audio(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    table = tables["knockout"]
    found: dict[str, Found] = {}
    for track in forms:
        mine = table[(table["track"] == track) & (table["keys"] == "audio") & (table["cut"] == "keys")]
        sure = mine[(mine["p_of_all"] < SIGNIFICANT) & (mine["probability"] < 0)]
        worst = (mine if sure.empty else sure).sort_values("probability", kind="stable").iloc[0]
        found[track] = (
            OPEN if sure.empty else HELD,
            {
                "largest change of p(truth)": f"{worst['probability']:+.2f}",
                "without": f"{worst['queries']} → audio",
                "around layer": f"{worst['layer']:.0f}",
                "p of all windows": p_value(worst["p_of_all"]),
            },
        )
    return Judgement(
        "The audio is read",
        "Instead, the model reads the audio positions.",
        *_together(found),
        f"some window of layers in which a position cannot read the audio costs p(truth), with p < {SIGNIFICANT} of "
        f"all windows together. This is causal; the paper's evidence is the lens. {CONTROL}",
        "Not public as a number.",
    )


def _enhances(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Judgement:
    found: dict[str, Found] = {}
    for _, line in tables["enhancement"].iterrows():
        sure = line["gain_low"] > 0 and line["p_of_all"] < SIGNIFICANT and line["source"] < line["target"]
        verdict: Verdict = HELD if sure else NOT if line["gain_high"] < 0 else OPEN
        numbers = {
            "layer": f"{line['source']:.0f} into {line['target']:.0f}",
            "gain in accuracy on held-out clips": interval(line["gain"], line["gain_low"], line["gain_high"], "+"),
            "p of all tracks": p_value(line["p_of_all"]),
        }
        found[line["track"]] = (verdict, numbers)
    return Judgement(
        "Enhancement helps",
        "Adding an early, attribute-rich layer to a later one makes the model answer better, without training.",
        *_together(found),
        "the interval of the gain on held-out clips lies above 0, and McNemar's test, corrected for all tracks, gives "
        f"p < {SIGNIFICANT}. The setting was chosen on other clips; where it puts a later layer into an earlier one, "
        "a gain would be none of the paper's.",
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
    of_track: Callable[[pd.DataFrame], Found],
) -> tuple[Verdict, str, pd.DataFrame]:
    table = tables["changes"]
    found: dict[str, Found] = {}
    for track, form in forms.items():
        part = table[(table["track"] == track) & (table["form"] == form) & (table["outcome"] == outcome)]
        clips = 0 if part.empty else int(part["samples"].iloc[0])
        verdict, numbers = of_track(part) if clips else (OPEN, {})
        found[track] = (verdict, {"clips": clips, **numbers})
    return _together(found)


def _together(found: Mapping[str, Found]) -> tuple[Verdict, str, pd.DataFrame]:
    """One verdict of several tracks: that of more than half of them, unless another track says the opposite."""
    if not found:
        return OPEN, "no track has these numbers", pd.DataFrame()
    counts = Counter(verdict for verdict, _ in found.values())
    table = pd.DataFrame([{"track": track, "here": verdict, **numbers} for track, (verdict, numbers) in found.items()])
    return _majority(counts, len(found)), _tally(counts, len(found)), table


def _tally(counts: Counter[Verdict], tracks: int) -> str:
    """Such as: held for 3 of 4 tracks, cannot be told for 1."""
    first, *others = (f"{verdict} for {counts[verdict]}" for verdict in (HELD, NOT, OPEN) if counts[verdict])
    return ", ".join([f"{first} of {tracks} track{'s' if tracks > 1 else ''}", *others])


def _majority(counts: Mapping[Verdict, int], tracks: int) -> Verdict:
    sides: Sequence[tuple[Verdict, Verdict]] = ((HELD, NOT), (NOT, HELD))
    for verdict, opposite in sides:
        if counts.get(verdict, 0) * 2 > tracks and not counts.get(opposite, 0):
            return verdict
    return OPEN

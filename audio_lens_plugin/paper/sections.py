"""The report of a run: what the paper says and whether it holds here, then each analysis with its numbers.

A section is a claim, what carries it, and what it does not show. Its first sentence claims one thing, with its number;
what it says of every track stands in a small table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.paper.design import CLIP, NO_AUDIO, SILENCE
from audio_lens_plugin.paper.findings import CONTROL, SIGNIFICANT, Judgement, judge, published, wording
from audio_lens_plugin.paper.folder import Identity
from audio_lens_plugin.recipes.logit_lens import LensResult
from audio_lens_plugin.report import (
    Picture,
    Section,
    example_pictures,
    folded_table,
    html_table,
    interval,
    p_value,
    with_intervals,
    with_p,
)

FEW = 50
HALF = 0.5
OUTCOMES = {"success": "answered rightly", "failure": "answered wrongly"}
FINDINGS, ANALYSES, CLIPS, RUN = "The paper's findings", "Analyses", "Single clips", "The run"
Tables = Mapping[str, pd.DataFrame]
Pictures = Mapping[str, Picture]
Forms = Mapping[str, str]
"""The prompt form that is shown, by track."""


def sections_of(identity: Identity, tables: Tables, pictures: Pictures, forms: Forms) -> list[Section]:
    """All sections but those of single clips.

    Args:
        pictures: by their names (see `finish.draw`).
        forms: the prompt form that is shown, by track.
    """
    judgements = judge(tables, forms)
    return [
        _overview(judgements, tables),
        *map(_finding, judgements),
        _accuracy(identity, tables, pictures, forms),
        _controls(tables),
        _information(tables, pictures, forms),
        _question(tables, pictures, forms),
        _curves(tables, pictures, forms),
        _critical(tables, pictures, forms),
        _share(tables, pictures, forms),
        _knockout(tables, pictures, forms),
        _patching(tables, pictures, forms),
        _enhancement(tables, pictures, forms),
    ]


def examples_section(result: LensResult, track: str, examples: Sequence[tuple[int, Clip | None]]) -> Section:
    """Single clips of a track, layer by layer, to be heard and seen."""
    unheard = any(clip is None for _, clip in examples)
    return Section(
        f"{track}: single clips",
        (
            f"The model says {', and '.join(_said(result, index) for index, _ in examples)}.",
            "One clip that is answered rightly and one that is not, where there are such: how probable the true label "
            "is at every position, layer by layer, under the sound itself.",
        ),
        figures=tuple(example_pictures(result, examples)),
        caveat="Two clips show what the numbers are made of; they prove nothing."
        + (
            " The clips themselves were not there when this page was made, so they cannot be played." if unheard else ""
        ),
        group=CLIPS,
    )


def _said(result: LensResult, index: int) -> str:
    """Such as: cow of clip_1, where pig is right."""
    sample = result.samples.iloc[index]
    right = "rightly" if sample["answer"] == sample["truth"] else f"where {sample['truth']} is right"
    return f"{sample['answer']} of {sample['sample']}, {right}"


def about_section(identity: Identity, clips: pd.DataFrame) -> Section:
    """What the run was a run of."""
    of_track = clips.groupby("track", sort=False)
    table = pd.DataFrame(
        [
            {
                "track": track,
                "clips": len(part),
                "seconds": f"{part['seconds'].min():.1f} to {part['seconds'].max():.1f}",
                "labels": ", ".join(f"{label} {count}" for label, count in part["label"].value_counts().items()),
                "groups": part["group"].nunique(),
            }
            for track, part in of_track
        ]
    )
    versions = ", ".join(f"{package} {number}" for package, number in identity.versions.items())
    settings = ", ".join(f"{name} {value}" for name, value in vars(identity.settings).items())
    return Section(
        "About this run",
        (
            f"{identity.model} heard {len(clips)} clips.",
            f"Model: revision {identity.revision or 'not known'}, weights {identity.weights}, {identity.dtype}, "
            f"{identity.attention} attention, {identity.layers} layers.",
            f"Data: hash {identity.data}. Settings: {settings}. {identity.split}.",
            f"{versions}.",
            "Layers of the lens count from 0, the embeddings; layer l is the output of the l-th block. Layers of "
            "patching, knockout and enhancement count blocks, from 0.",
        ),
        table=html_table(table),
        caveat="run.json beside this page holds all of it; tables/ holds every number, figures/ every picture.",
        group=RUN,
    )


def correlation_table(table: pd.DataFrame) -> str:
    """Critical layer against accuracy, one line per kind of points, as HTML."""
    cells = table.assign(
        cell=[
            "–" if pd.isna(value) else f"{value:.2f} (p = {p_value(p)})"
            for value, p in zip(table["value"], table["p"], strict=True)
        ]
    )
    wide = cells.pivot_table(index=["of", "points"], columns="measure", values="cell", aggfunc="first", sort=False)
    return html_table(wide.reset_index().rename(columns={"of": "points of"}).rename_axis(columns=None))


def _overview(judgements: Sequence[Judgement], tables: Tables) -> Section:
    counts = {verdict: sum(one.verdict == verdict for one in judgements) for verdict in ("held", "did not hold")}
    table = pd.DataFrame(
        [{"here": one.verdict, "finding of the paper": one.claim, "in numbers": one.here} for one in judgements]
    )
    return Section(
        "What held",
        (
            f"{counts['held']} of {len(judgements)} findings of AudioLens held for this model on these clips.",
            f"{counts['did not hold']} did not hold, and {len(judgements) - sum(counts.values())} cannot be told from "
            "them. The paper is arXiv 2506.05140.",
        ),
        summary=html_table(table),
        caveat=_few(int(tables["accuracy"]["samples"].max())),
    )


def _finding(judgement: Judgement) -> Section:
    return Section(
        judgement.name,
        (f"{judgement.claim.rstrip('.')}: {judgement.here}.", f"The paper: {judgement.paper}"),
        summary=None if judgement.tracks.empty else html_table(judgement.tracks),
        caveat=f"Rule: {judgement.rule}",
        verdict=judgement.verdict,
        group=FINDINGS,
    )


def _accuracy(identity: Identity, tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["accuracy"]
    restricted, free = (table[table["measure"] == measure] for measure in ("labels", "free"))
    means = restricted.pivot_table(index="track", columns="control", values="value", sort=False)
    said = free[free["control"] == CLIP].groupby("track")["value"].mean()
    chance = restricted.groupby("track")["chance"].mean()
    names = {CLIP: "with the clip", SILENCE: "with silence", NO_AUDIO: "without audio"}
    summary = means.rename(columns=names).assign(**{"free answer to the clip": said, "chance": chance})
    return Section(
        "How often the model is right",
        (
            f"Restricted to the labels, {means[CLIP].mean():.0%} of the answers are right with the clip, "
            f"{means[SILENCE].mean():.0%} with silence and {means[NO_AUDIO].mean():.0%} without audio.",
            "These are means over prompt forms and tracks. A free answer counts where it names the true label and no "
            "other. p: whether answers go with the true labels at all, against labels dealt anew to the clips, "
            "corrected for all prompt forms and tracks (Holm).",
            *_published(identity),
        ),
        summary=_by_track(summary),
        table=folded_table(_by_form(table)),
        figures=(pictures["accuracy"],),
        caveat="Restricted answers compare first tokens of the labels; a model that would say something else is not "
        f"seen there.{wording(forms)}",
        group=ANALYSES,
    )


def _by_form(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with intervals, one line per track and prompt form; p of what is restricted to the labels."""
    restricted = table["measure"] == "labels"
    cells = with_intervals(table, "value").assign(
        of=table["control"].where(restricted, table["control"] + ", free answer")
    )
    by = ["track", "form"]
    wide = cells.pivot_table(index=by, columns="of", values="value", aggfunc="first", sort=False)
    p = table[restricted & (table["control"] == CLIP)].set_index(by)["p_of_all"].map(p_value)
    return wide.assign(**{"p, clip": p}).reset_index().rename_axis(columns=None)


def _published(identity: Identity) -> tuple[str, ...]:
    numbers = published(identity.model)
    said = ", ".join(f"{track} {value:.3f}" for track, value in numbers.items())
    return (
        (f"Published for this model on SAKURA's single-hop questions, 500 clips a track: {said}.",) if numbers else ()
    )


def _controls(tables: Tables) -> Section:
    table = tables["controls"]
    better = table.assign(better=(table["p_of_all"] < SIGNIFICANT) & (table["difference"] > 0))
    summary = (
        better.groupby(["track", "control"], sort=False)
        .agg(forms=("form", "size"), gain=("difference", "mean"), better=("better", "sum"))
        .reset_index()
        .rename(columns={"gain": "mean gain in accuracy", "better": "forms that are better"})
    )
    return Section(
        "Whether the clip matters",
        (
            f"In {better['better'].sum()} of {len(table)} comparisons the model answers better with the clip than "
            "without it.",
            "Without it: with silence of the same length, or without audio. Better: McNemar's exact test, Holm's "
            "correction for all comparisons, 5 %.",
        ),
        summary=html_table(summary),
        table=folded_table(with_p(with_intervals(table, "difference"), "p", "p_of_all")),
        caveat="Prompt forms ask about the same clips, so their comparisons are not independent. A correction for all "
        "of them finds little where clips are few.",
        group=ANALYSES,
    )


def _information(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["information"]
    heard = table[table["control"] == CLIP]
    last = heard[heard["span"] == "last"]
    lines = []
    for track, form in forms.items():
        part = _shown(last, track, form)
        sure, best = part[part["p_of_all"] < SIGNIFICANT], part.nlargest(1, "score").iloc[0]
        lines.append(
            {
                "track": track,
                "first layer above chance": _layer(sure["layer"].min()),
                "highest score": interval(best["score"], best["low"], best["high"]),
                "after layer": _layer(best["layer"]),
                "chance": best["chance"],
            }
        )
    summary = pd.DataFrame(lines)
    above = summary["first layer above chance"] != "–"
    return Section(
        "Where the answer is, layer by layer",
        (
            f"At the last position, the true label is on top more often than by chance in {above.sum()} of "
            f"{_tracks(forms)}.",
            f"{_forms(forms)}; p < {SIGNIFICANT}, corrected for all layers of a form.",
        ),
        summary=html_table(summary),
        table=folded_table(_by_layer(heard[_of_form(heard, forms) | (heard["span"] == "audio")], "span", "score")),
        figures=(pictures["information"], *(pictures[f"forms_{track}"] for track in forms)),
        caveat="The lens reads states with the model's own last norm and unembedding: what is there in another form "
        "is not seen. What stands at the audio positions does not depend on the words after them; it was read "
        f"once.{wording(forms)} tables/information.parquet has every form, with p.",
        group=ANALYSES,
    )


def _question(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    title, drawn = "What the words of the question know", [track for track in forms if f"words_{track}" in pictures]
    if not drawn:
        told = "The questions differ from clip to clip: their words cannot be laid over each other."
        return Section(title, (told,), group=ANALYSES)
    words = tables["question_words"]
    best = pd.concat(
        [_shown(words[words["control"] == CLIP], track, forms[track]).nlargest(1, "score") for track in drawn]
    )
    best["chance"] = best["track"].map(tables["information"].groupby("track")["chance"].first())
    most = best.assign(above=best["score"] - best["chance"]).nlargest(1, "above").iloc[0]
    return Section(
        title,
        (
            f"No word knows more than “{most['text']}” of {most['track']}: its score is {most['score']:.2f} after "
            f"layer {most['layer']}, where chance is {most['chance']:.2f}.",
            f"The question stands after the clip, so its words may have read it. {_forms(forms)}.",
        ),
        summary=html_table(
            with_intervals(best, "score")[["track", "text", "layer", "score", "chance"]].rename(
                columns={"text": "best word", "layer": "after layer"}
            )
        ),
        figures=tuple(pictures[f"words_{track}"] for track in drawn),
        caveat="The best of many words and layers is partly luck: its interval does not know that it was picked. All "
        "forms and controls are in tables/question_words.parquet.",
        group=ANALYSES,
    )


def _curves(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["curves"]
    last = table[(table["control"] == CLIP) & (table["span"] == "last")]
    shown = last[_of_form(last, forms)]
    lines = [{"track": track, **_parting(part)} for track, part in shown.groupby("track", sort=False)]
    summary = pd.DataFrame(lines)
    return Section(
        "Success and failure",
        (
            f"p(true label) of right and wrong answers parts in {summary['they part after layer'].notna().sum()} of "
            f"{_tracks(forms)}.",
            "They part after the first layer at which the interval of the right ones lies above that of the wrong "
            f"ones. {_forms(forms)}, last position.",
        ),
        summary=html_table(summary.assign(**{"they part after layer": summary["they part after layer"].map(_layer)})),
        table=folded_table(_by_layer(shown.assign(outcome=shown["outcome"].map(OUTCOMES)), "outcome", "probability")),
        figures=(pictures["curves"],),
        caveat="The two kinds of clips are chosen by the answer: at the last layer they must differ.",
        group=ANALYSES,
    )


def _parting(part: pd.DataFrame) -> dict[str, Any]:
    """How many answers of a track are right and wrong, and after which layer they part."""
    right, wrong = (part[part["outcome"] == outcome].set_index("layer") for outcome in ("success", "failure"))
    apart = right.index[right["low"] > wrong["high"]]
    return {
        "right": right["samples"].iloc[0],
        "wrong": wrong["samples"].iloc[0],
        "they part after layer": apart.min(),
    }


def _critical(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table, correlations = tables["critical_layers"], tables["correlation"]
    shown = with_intervals(table, "layer").drop(columns=["layers"])
    return Section(
        "Critical layer and accuracy",
        (
            f"{table['layer'].notna().sum()} of {len(table)} combinations of track and prompt form have a critical "
            "layer.",
            "In the others no layer's score exceeds (1 + 0.2) / number of labels. Does accuracy fall where the "
            "critical layer is late? Correlations over all combinations, over the forms of one track, and over the "
            "tracks' means; p by permutation.",
        ),
        summary=correlation_table(correlations),
        table=folded_table(shown),
        figures=(pictures["critical_layers"],),
        caveat="A critical layer of a model near chance is made of noise: look at its interval, and at the share of "
        f"resamples that have none (undefined).{wording(forms)}",
        group=ANALYSES,
    )


def _share(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["attribute_share"]
    shown = table[_of_form(table, forms) | (table["span"] == "audio")].dropna(subset=["share"])
    words = shown[shown["span"] == "attribute"].nlargest(1, "share")
    lead = "No track has a word that names its attribute and information at the last position."
    for _, most in words.iterrows():
        share = max(most["share"], 0.0)  # a score below chance is no information
        lead = f"The word that names the attribute holds at most {share:.0%} of what the last position holds."
    summary = with_intervals(shown, "share").pivot_table(
        index="track", columns="span", values="share", aggfunc="first", sort=False
    )
    return Section(
        "Attribute words against the last token",
        (
            lead,
            f"Information above chance, summed over layers, as a share of that at the last position. {_forms(forms)}.",
        ),
        summary=_by_track(summary),
        table=folded_table(with_intervals(table, "share")),
        figures=(pictures["attribute_share"],),
        caveat="A share of next to nothing means little: see the scores themselves in the table.",
        group=ANALYSES,
    )


def _knockout(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["knockout"]
    cut, control = (table[table["cut"] == kind] for kind in ("keys", "control"))
    sure = cut["p_of_all"] < SIGNIFICANT
    audio = cut[cut["keys"] == "audio"]
    worst = audio.loc[audio.groupby("track", sort=False)["probability"].idxmin()]
    most = worst.nsmallest(1, "probability").iloc[0]
    return Section(
        "Who must read the audio, and where",
        (
            f"Most is lost in {most['track']}: p(truth) changes by {most['probability']:+.2f} without "
            f"{most['queries']} → audio around layer {most['layer']}.",
            f"{sure.sum()} of {len(cut)} windows change p(truth) with p < {SIGNIFICANT} of all windows of a pair "
            "(signs flipped by clip, maximum over windows). Of each track, the window that costs most, and what the "
            "control costs there:",
        ),
        summary=html_table(_beside_control(worst, control)),
        table=folded_table(_beside_control(audio[audio["queries"] == "last"], control)),
        figures=(pictures["knockout"], *(pictures[f"knockout_{track}"] for track in forms)),
        caveat=f"Cutting attention also does damage. {CONTROL} tables/knockout.parquet has every pair.",
        group=ANALYSES,
    )


def _beside_control(cut: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Windows with the control of the same window, for people."""
    both = cut.merge(control, on=["track", "form", "queries", "keys", "layer"], suffixes=("", "_control"))
    return pd.DataFrame(
        {
            "track": both["track"],
            "cut": both["queries"] + " → " + both["keys"],
            "layer": both["layer"],
            "change of p(truth)": _changes(both, "probability"),
            "p of all": both["p_of_all"].map(p_value),
            "blocked": both["blocked"].round().astype(int),
            "control": _changes(both, "probability", "_control"),
            "blocked by it": both["blocked_control"].round().astype(int),
        }
    )


def _patching(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["patching"]
    enough = table[table["value"] >= HALF]
    audio, last = (enough[enough["position"] == position].groupby("track")["layer"] for position in ("audio", "last"))
    until, since = audio.max().reindex(list(forms)), last.min().reindex(list(forms))
    lead = "No state of the last position brings back half of what the clip does."
    if since.notna().any():
        lead = f"The last position alone brings back half of what the clip does, from {_layers(since)} on."
    return Section(
        "Which states are enough",
        (
            lead,
            "States of the run with the clip are put into the same run with silence, one layer and position at a time. "
            "Grounding is the effect of the audio positions over that of all positions.",
        ),
        summary=_by_track(
            pd.DataFrame(
                {
                    "the audio brings back half, until layer": until.map(_layer),
                    "the last position does, from layer": since.map(_layer),
                }
            )
        ),
        table=folded_table(_by_layer(table[table["position"] != "all"], "position", "value")),
        figures=(pictures["grounding"], *(pictures[f"patching_{track}"] for track in forms)),
        caveat="Shares are of the difference in logits of the two runs; where the clip makes none, they are noise.",
        group=ANALYSES,
    )


def _enhancement(tables: Tables, pictures: Pictures, forms: Forms) -> Section:
    table = tables["enhancement"]
    sure = (table["p_of_all"] < SIGNIFICANT) & (table["gain"] > 0)
    summary = pd.DataFrame(
        {
            "track": table["track"],
            "source → target": [
                f"{source} → {target}" for source, target in zip(table["source"], table["target"], strict=True)
            ],
            "clips": table["samples"],
            "before": table["before"],
            "after": table["after"],
            "gain": _changes(table, "gain"),
            "relative": ["–" if pd.isna(value) else f"{value:+.0%}" for value in table["relative"]],
            "gained": table["gained"],
            "lost": table["lost"],
            "p of all": table["p_of_all"].map(p_value),
        }
    )
    return Section(
        "Whether the answer can be put back",
        (
            f"On held-out clips the enhancement changes accuracy by {table['gain'].mean():+.2f}, and beyond chance in "
            f"{sure.sum()} of {_tracks(forms)}.",
            "The setting (source and target layer at the last position, coefficient 1) was chosen on other clips, "
            "speakers kept apart where file names tell them. p: McNemar's exact test, corrected for all tracks (Holm).",
        ),
        summary=html_table(summary),
        figures=(pictures["enhancement"], *(pictures[f"enhancement_{track}"] for track in forms)),
        caveat="Where the maps of the development clips are flat, the choice between their settings says nothing.",
        group=ANALYSES,
    )


def _shown(table: pd.DataFrame, track: str, form: str) -> pd.DataFrame:
    return table[(table["track"] == track) & (table["form"] == form)]


def _of_form(table: pd.DataFrame, forms: Forms) -> pd.Series:
    """Which lines are of the prompt form that is shown."""
    return table["form"] == table["track"].map(forms)


def _by_layer(table: pd.DataFrame, columns: str, value: str) -> pd.DataFrame:
    """Numbers with intervals, one line per track and layer."""
    cells = with_intervals(table, value)
    wide = cells.pivot_table(index=["track", "layer"], columns=columns, values=value, aggfunc="first", sort=False)
    return wide.reset_index().rename_axis(columns=None)


def _by_track(table: pd.DataFrame) -> str:
    """A table whose index is the track, as HTML."""
    return html_table(table.reset_index(names="track").rename_axis(columns=None))


def _changes(table: pd.DataFrame, column: str, of: str = "") -> list[str]:
    numbers = (table[f"{column}{end}{of}"] for end in ("", "_low", "_high"))
    return [interval(value, low, high, "+") for value, low, high in zip(*numbers, strict=True)]


def _layer(layer: Any) -> str:
    return "–" if pd.isna(layer) else f"{layer:.0f}"


def _layers(layers: pd.Series) -> str:
    """Such as: layer 3, or: layers 2 to 5."""
    first, last = layers.min(), layers.max()
    return f"layer {first:.0f}" if first == last else f"layers {first:.0f} to {last:.0f}"


def _tracks(forms: Forms) -> str:
    return f"{len(forms)} track{'s' if len(forms) > 1 else ''}"


def _forms(forms: Forms) -> str:
    return f"Prompt form {', '.join(dict.fromkeys(forms.values()))}"


def _few(clips: int) -> str:
    return f"At most {clips} clips a track are few: read the intervals, not the numbers." if clips < FEW else ""

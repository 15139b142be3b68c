"""The report of a run: what the paper says and whether it holds here, then each analysis with its numbers.

A section is a claim, what carries it, and what it does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.paper.design import CLIP, NO_AUDIO, SILENCE
from audio_lens_plugin.paper.findings import Judgement, judge, published
from audio_lens_plugin.paper.folder import Identity
from audio_lens_plugin.recipes.logit_lens import LensResult
from audio_lens_plugin.report import Picture, Section, example_pictures, folded_table, html_table, with_intervals

FEW = 50
Tables = Mapping[str, pd.DataFrame]
Pictures = Mapping[str, Picture]


def sections_of(identity: Identity, tables: Tables, pictures: Pictures, forms: Mapping[str, str]) -> list[Section]:
    """All sections but those of single clips.

    Args:
        pictures: by their names (see `finish.draw`).
        forms: the prompt form that is shown, by track.
    """
    judgements = judge(tables, forms)
    tracks = list(forms)
    return [
        _overview(judgements, tables),
        *map(_finding, judgements),
        _accuracy(identity, tables, pictures),
        _controls(tables),
        _information(tables, pictures, tracks),
        _question(tables, pictures, tracks),
        _curves(tables, pictures),
        _critical(tables, pictures),
        _share(tables, pictures),
        _knockout(tables, pictures, tracks),
        _patching(tables, pictures, tracks),
        _enhancement(tables, pictures, tracks),
    ]


def examples_section(result: LensResult, track: str, examples: Sequence[tuple[int, Clip | None]]) -> Section:
    """Single clips of a track, layer by layer, to be heard and seen."""
    unheard = any(clip is None for _, clip in examples)
    return Section(
        f"{track}: single clips",
        (
            "One clip that is answered rightly and one that is not, where there are such: how probable the true label "
            "is at every position, layer by layer, under the sound itself.",
        ),
        figures=tuple(example_pictures(result, examples)),
        caveat="Two clips show what the numbers are made of; they prove nothing."
        + (
            " The clips themselves were not there when this page was made, so they cannot be played." if unheard else ""
        ),
    )


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
            f"{identity.model}, revision {identity.revision or 'not known'}, weights {identity.weights}, "
            f"{identity.dtype}, {identity.attention} attention, {identity.layers} layers.",
            f"Data: hash {identity.data}. Settings: {settings}. {identity.split}.",
            f"{versions}.",
            "Layers of the lens count from 0, the embeddings; layer l is the output of the l-th block. Layers of "
            "patching, knockout and enhancement count blocks, from 0.",
        ),
        table=html_table(table),
        caveat="run.json beside this page holds all of it; tables/ holds every number, figures/ every picture.",
    )


def _overview(judgements: Sequence[Judgement], tables: Tables) -> Section:
    counts = {verdict: sum(one.verdict == verdict for one in judgements) for verdict in ("held", "did not hold")}
    table = pd.DataFrame([{"finding of the paper": one.claim, "here": one.verdict} for one in judgements])
    return Section(
        "What held",
        (
            f"Of {len(judgements)} findings of AudioLens (arXiv 2506.05140), {counts['held']} held for this model on "
            f"these clips, {counts['did not hold']} did not, and {len(judgements) - sum(counts.values())} cannot be "
            "told from them.",
        ),
        table=html_table(table),
        caveat=_few(int(tables["accuracy"]["samples"].max())),
    )


def _finding(judgement: Judgement) -> Section:
    return Section(
        judgement.name,
        (
            judgement.claim,
            f"{judgement.measured[:1].upper()}{judgement.measured[1:]}.",
            f"The paper: {judgement.paper}",
        ),
        caveat=f"Rule: {judgement.rule}",
        verdict=judgement.verdict,
    )


def _accuracy(identity: Identity, tables: Tables, pictures: Pictures) -> Section:
    table = tables["accuracy"]
    means = table[table["measure"] == "labels"].groupby(["track", "control"], sort=False)["value"].mean()
    said = "; ".join(
        f"{track} {means.get((track, CLIP), float('nan')):.2f} with the clip, "
        f"{means.get((track, SILENCE), float('nan')):.2f} with silence, "
        f"{means.get((track, NO_AUDIO), float('nan')):.2f} without audio"
        for track in dict.fromkeys(table["track"])
    )
    shown = with_intervals(table, "value").assign(
        p=table["p"].map("{:.2g}".format), p_of_all=table["p_of_all"].map("{:.2g}".format)
    )
    columns = ["track", "form", "control", "measure", "value", "chance", "samples", "p", "p_of_all"]
    return Section(
        "How often the model is right",
        (
            f"Mean over prompt forms, restricted to the labels: {said}.",
            "A free answer counts where it names the true label and no other. p: whether answers go with the true "
            "labels at all, against labels dealt anew to the clips; p_of_all is corrected for all lines of a "
            "measure and control (Holm).",
            *_published(identity),
        ),
        table=folded_table(shown[columns]),
        figures=(pictures["accuracy"],),
        caveat="Restricted answers compare first tokens of the labels; a model that would say something else is not "
        "seen there.",
    )


def _published(identity: Identity) -> tuple[str, ...]:
    numbers = published(identity.model)
    said = ", ".join(f"{track} {value:.3f}" for track, value in numbers.items())
    return (
        (f"Published for this model on SAKURA's single-hop questions, 500 clips a track: {said}.",) if numbers else ()
    )


def _controls(tables: Tables) -> Section:
    table = tables["controls"]
    sure = table[(table["p_of_all"] < 0.05) & (table["difference"] > 0)]
    p = {name: table[name].map("{:.2g}".format) for name in ("p", "p_of_all")}
    return Section(
        "Whether the clip matters",
        (
            f"In {len(sure)} of {len(table)} comparisons the model answers better with the clip than with silence of "
            "the same length or without audio (McNemar's exact test, Holm's correction for all of them, 5 %).",
        ),
        table=folded_table(with_intervals(table, "difference").assign(**p)),
    )


def _information(tables: Tables, pictures: Pictures, tracks: Sequence[str]) -> Section:
    table = tables["information"]
    last = table[(table["span"] == "last") & (table["control"] == CLIP) & table["track"].isin(tracks)]
    lines = []
    for track, part in last.groupby("track", sort=False):
        sure = part[part["p_of_all"] < 0.05]
        first = "at no layer" if sure.empty else f"from layer {sure['layer'].min()} on"
        lines.append(f"{track}: above chance {first} in some form, at most {part['score'].max():.2f}")
    shown = with_intervals(table, "score").assign(p_of_all=table["p_of_all"].map("{:.2g}".format))
    columns = ["track", "form", "span", "layer", "score", "chance", "p_of_all"]
    return Section(
        "Where the answer is, layer by layer",
        (f"At the last position, {'; '.join(lines)} (p corrected for all layers of a form).",),
        table=folded_table(shown[(table["control"] == CLIP) & (table["span"] == "last")][columns]),
        figures=(pictures["information"], *(pictures[f"forms_{track}"] for track in tracks)),
        caveat="The lens reads states with the model's own last norm and unembedding: what is there in another form "
        "is not seen. What stands at the audio positions does not depend on the words after them; it was read once.",
    )


def _question(tables: Tables, pictures: Pictures, tracks: Sequence[str]) -> Section:
    drawn = [f"words_{track}" for track in tracks if f"words_{track}" in pictures]
    return Section(
        "What the words of the question know",
        ("The question stands after the clip, so its words may have read it.",) if drawn else
        ("The questions differ from clip to clip: their words cannot be laid over each other.",),
        figures=tuple(pictures[name] for name in drawn),
        caveat="All forms and controls are in tables/question_words.parquet." if drawn else "",
    )  # fmt: skip


def _curves(tables: Tables, pictures: Pictures) -> Section:
    return Section(
        "Success and failure",
        ("How probable the true label is on the way through the model, where it is answered rightly and wrongly.",),
        figures=(pictures["curves"],),
        caveat="The two kinds of clips are chosen by the answer: at the last layer they must differ.",
    )


def _critical(tables: Tables, pictures: Pictures) -> Section:
    table = tables["critical_layers"]
    undefined = int(table["layer"].isna().sum())
    shown = with_intervals(table, "layer").drop(columns=["layers"])
    correlations = tables["correlation"].assign(p=tables["correlation"]["p"].map("{:.2g}".format))
    return Section(
        "Critical layer and accuracy",
        (
            f"{len(table) - undefined} of {len(table)} combinations of track and form have a critical layer; in the "
            "others no layer's score exceeds (1 + 0.2) / number of labels.",
            *(
                f"{line['of']}: {line['measure']} {line['value']:.2f} (p = {line['p']}, {line['points']} points)."
                for _, line in correlations.iterrows()
                if "within" not in line["of"]
            ),
        ),
        table=folded_table(shown),
        figures=(pictures["critical_layers"],),
        caveat="A critical layer of a model near chance is made of noise: look at its interval, and at the share of "
        "resamples that have none.",
    )


def _share(tables: Tables, pictures: Pictures) -> Section:
    table = tables["attribute_share"]
    return Section(
        "Attribute words against the last token",
        ("How much of the information is at the word that names the attribute, in the question, and at the audio.",),
        table=folded_table(with_intervals(table, "share")),
        figures=(pictures["attribute_share"],),
        caveat="A share of next to nothing means little: see the scores themselves in the table.",
    )


def _knockout(tables: Tables, pictures: Pictures, tracks: Sequence[str]) -> Section:
    table = tables["knockout"]
    sure = table[(table["cut"] == "keys") & (table["p_of_all"] < 0.05)]
    windows = int((table["cut"] == "keys").sum())
    p = {name: table[name].map("{:.2g}".format) for name in ("p", "p_of_all")}
    shown = with_intervals(table, "probability", "accuracy").assign(**p)
    return Section(
        "Who must read the audio, and where",
        (
            f"{len(sure)} of {windows} windows change p(truth) with p < 0.05 of all windows of a pair (signs flipped "
            "by clip, maximum over windows).",
        ),
        table=folded_table(shown[table["p_of_all"] < 0.05]),
        figures=(pictures["knockout"], *(pictures[f"knockout_{track}"] for track in tracks)),
        caveat="Cutting attention also does damage: the control cuts as many other keys, drawn by chance. The table "
        "shows windows with p < 0.05; tables/knockout.parquet has all.",
    )


def _patching(tables: Tables, pictures: Pictures, tracks: Sequence[str]) -> Section:
    table = tables["patching"]
    return Section(
        "Which states are enough",
        ("States of the run with the clip are put into the same run with silence, one layer and position at a time.",),
        table=folded_table(with_intervals(table, "value")),
        figures=(pictures["grounding"], *(pictures[f"patching_{track}"] for track in tracks)),
        caveat="Shares are of the difference in logits of the two runs; where the clip makes none, they are noise.",
    )


def _enhancement(tables: Tables, pictures: Pictures, tracks: Sequence[str]) -> Section:
    table = tables["enhancement"]
    said = "; ".join(
        f"{line['track']} {line['before']:.2f} to {line['after']:.2f}, {line['gained']} gained, {line['lost']} lost "
        f"(p = {line['p']:.2g}, {line['p_of_all']:.2g} of all)"
        for _, line in table.iterrows()
    )
    shown = with_intervals(table, "before", "after", "gain").assign(p_of_all=table["p_of_all"].map("{:.2g}".format))
    return Section(
        "Whether the answer can be put back",
        (f"Accuracy on held-out clips: {said}.",),
        table=folded_table(shown.drop(columns=["p"])),
        figures=(pictures["enhancement"], *(pictures[f"enhancement_{track}"] for track in tracks)),
        caveat="The setting (source and target layer at the last position, coefficient 1) was chosen on other clips, "
        "speakers kept apart where file names tell them.",
    )


def _few(clips: int) -> str:
    return f"At most {clips} clips a track are few: read the intervals, not the numbers." if clips < FEW else ""

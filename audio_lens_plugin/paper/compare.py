"""Runs of several models side by side: their tables below each other, and one report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from audio_lens_plugin.paper import figures
from audio_lens_plugin.paper.design import CLIP
from audio_lens_plugin.paper.figures import Drawn
from audio_lens_plugin.paper.findings import SIGNIFICANT, Judgement, judge, pearson, wording
from audio_lens_plugin.paper.folder import RunFolder, write_table, write_whole
from audio_lens_plugin.paper.sections import correlation_table
from audio_lens_plugin.paper.tables import TABLES, correlations
from audio_lens_plugin.recipes.lens_figures import models_side_by_side
from audio_lens_plugin.report import (
    Picture,
    Section,
    folded_table,
    html_table,
    with_intervals,
    write_report,
)
from audio_lens_plugin.results import ResultError


def compare(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Lay finished runs side by side; returns the path of the report.

    ``out/tables`` has every table of the runs with a column ``model`` before the others.

    Raises:
        ResultError: fewer than two runs, a folder that is no finished run, or runs without a track in common.
    """
    out, opened = Path(out), [RunFolder.open(Path(path)) for path in runs]
    if len(opened) < 2:
        raise ResultError("two runs or more can be compared.")
    names = _names(opened)
    forms = _common_forms(opened)
    every = {name: _tables(run) for name, run in zip(names, opened, strict=True)}
    tables = {
        table: pd.concat([found[table].assign(model=name) for name, found in every.items()], ignore_index=True)
        for table in TABLES
        if all(table in found for found in every.values())
    }
    tables = {
        name: table[["model", *(column for column in table if column != "model")]] for name, table in tables.items()
    }
    critical = tables["critical_layers"]
    tables["correlation"] = correlations(critical[critical["track"].isin(list(forms))], of=("model", "track", "form"))
    for name, table in tables.items():
        write_table(out / "tables", name, table)
    pictures = figures.keep(out / "figures", _draw(tables, forms))
    same_data = len({run.identity.data for run in opened}) == 1
    sections = _sections(every, tables, pictures, forms, same_data)
    return write_whole(
        out / "report.html",
        lambda file: write_report(file, "Models side by side", f"{', '.join(names)}: the AudioLens paper.", sections),
    )


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The models' names; with the run's folder where a model comes twice."""
    models = [run.identity.model for run in runs]
    return [
        model if models.count(model) == 1 else f"{model} ({run.path.name})"
        for model, run in zip(models, runs, strict=True)
    ]


def _common_forms(runs: Sequence[RunFolder]) -> dict[str, str]:
    first, *others = ({one.name: one.causal for one in run.identity.subjects} for run in runs)
    forms = {name: form for name, form in first.items() if form and all(other.get(name) == form for other in others)}
    if not forms:
        raise ResultError("the runs have no track in common.")
    return forms


def _tables(run: RunFolder) -> dict[str, pd.DataFrame]:
    found = {path.stem: pd.read_parquet(path) for path in sorted((run.path / "tables").glob("*.parquet"))}
    if "accuracy" not in found:
        raise ResultError(f"{run.path} has no tables yet; finish it, or run `audio-lens merge {run.path}`.")
    return found


def _draw(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Iterator[tuple[str, Drawn]]:
    critical = tables["critical_layers"]
    yield "information", _information(tables["information"], critical, forms)
    yield "critical_layers", figures.critical_layers(critical[critical["track"].isin(list(forms))], by="model")
    enhanced = tables["enhancement"]
    enhanced = enhanced[enhanced["track"].isin(list(forms))].sort_values("track", kind="stable")
    yield (
        "enhancement",
        figures.enhancement(enhanced.assign(run=enhanced["model"] + "\n" + enhanced["track"]), by="run"),
    )


def _information(table: pd.DataFrame, critical: pd.DataFrame, forms: Mapping[str, str]) -> Drawn:
    parts = []
    for track, form in forms.items():
        chosen = (
            (table["track"] == track) & (table["form"] == form) & (table["control"] == CLIP) & (table["span"] == "last")
        )
        for model in dict.fromkeys(table.loc[chosen, "model"]):
            part = table[chosen & (table["model"] == model)]
            line = critical[
                (critical["model"] == model) & (critical["track"] == track) & (critical["form"] == form)
            ].iloc[0]
            depth = {"depth": part["layer"] / part["layer"].max(), "critical": line["layer"] / line["layers"]}
            parts.append(part.assign(**depth))
    scores = pd.concat(parts, ignore_index=True)
    best = scores.assign(of=scores["track"] + ", " + scores["model"]).groupby("of", sort=False)["score"].max()
    said = "; ".join(f"{name}: {value:.2f}" for name, value in best.items())
    return Drawn(
        models_side_by_side(scores),
        f"Information score at the last position by depth, one panel per track. Highest: {said}.",
        "Information score at the last position, by depth; dashed: critical layer, dotted: chance.",
    )


def _sections(
    every: Mapping[str, Mapping[str, pd.DataFrame]],
    tables: Mapping[str, pd.DataFrame],
    pictures: Mapping[str, Picture],
    forms: Mapping[str, str],
    same_data: bool,
) -> list[Section]:
    data = "All runs are of the same clips." if same_data else "The runs are of DIFFERENT clips: compare with care."
    return [
        _verdicts({model: judge(found, forms) for model, found in every.items()}, data),
        _accuracy(tables["accuracy"], forms),
        _where(tables["information"], forms, pictures["information"]),
        _critical(tables["correlation"], forms, pictures["critical_layers"]),
        _enhancement(tables["enhancement"], pictures["enhancement"]),
    ]


def _verdicts(verdicts: Mapping[str, Sequence[Judgement]], data: str) -> Section:
    claims = [one.claim for one in next(iter(verdicts.values()))]
    held = pd.DataFrame({"finding of the paper": claims} | {m: [one.verdict for one in v] for m, v in verdicts.items()})
    everywhere = (held[list(verdicts)] == "held").all(axis=1).sum()
    return Section(
        "What held",
        (f"{everywhere} of {len(claims)} findings of AudioLens held in each of the {len(verdicts)} runs.", data),
        table=html_table(held),
        caveat="The reports of the runs have the numbers and the rules.",
    )


def _accuracy(table: pd.DataFrame, forms: Mapping[str, str]) -> Section:
    restricted = table[table["measure"] == "labels"]
    means = restricted.pivot_table(index=["track", "control"], columns="model", values="value", sort=False)
    common = means[means.index.get_level_values("track").isin(list(forms))]
    heard = common[common.index.get_level_values("control") == CLIP].mean()
    return Section(
        "How often the models are right",
        (
            f"{heard.idxmax()} is right most often with the clip, in {heard.max():.0%} of its answers.",
            "Mean over prompt forms, restricted to the labels; the first sentence is about tracks that all runs have.",
        ),
        table=html_table(means.reset_index().rename_axis(columns=None)),
        caveat=wording(forms).strip(),
    )


def _where(table: pd.DataFrame, forms: Mapping[str, str], figure: Picture) -> Section:
    shown = table[(table["control"] == CLIP) & (table["span"] == "last") & (table["form"] == table["track"].map(forms))]
    best = shown.loc[shown.groupby(["track", "model"], sort=False)["score"].idxmax()]
    most = best.nlargest(1, "score").iloc[0]
    cells = with_intervals(best, "score")
    cells = cells.assign(
        score=[f"{one}, layer {layer}" for one, layer in zip(cells["score"], cells["layer"], strict=True)]
    )
    wide = cells.pivot_table(index="track", columns="model", values="score", aggfunc="first", sort=False)
    return Section(
        "Where the answer is",
        (
            f"The last position knows most in {most['model']}, about {most['track']}: {most['score']:.2f} after layer "
            f"{most['layer']}.",
            "The highest information score of each track, and the layer after which it is reached:",
        ),
        summary=html_table(wide.reset_index().rename_axis(columns=None)),
        figures=(figure,),
        caveat="The highest score of many layers is partly luck: its interval does not know that it was picked.",
    )


def _critical(table: pd.DataFrame, forms: Mapping[str, str], figure: Picture) -> Section:
    across = table[(table["of"] == "model x track x form") & (table["measure"] == "pearson")].iloc[0]
    return Section(
        "Critical layer and accuracy",
        (
            f"Over all models, tracks and forms, {pearson(across)}.",
            "Critical layers are shares of each model's depth.",
        ),
        summary=correlation_table(table),
        figures=(figure,),
        caveat=f"Points of one model and track share clips; p values treat them as independent.{wording(forms)}",
    )


def _enhancement(table: pd.DataFrame, figure: Picture) -> Section:
    better = (table["p_of_all"] < SIGNIFICANT) & (table["gain"] > 0)
    columns = ["model", "track", "source", "target", "samples", "before", "after", "gain", "gained", "lost"]
    return Section(
        "Whether the answer can be put back",
        (f"The enhancement helps beyond chance in {better.sum()} of {len(table)} pairs of model and track.",),
        table=folded_table(with_intervals(table, "before", "after", "gain")[columns]),
        figures=(figure,),
        caveat="Held-out clips; the setting was chosen on others. Corrected for the tracks of each run (Holm).",
    )

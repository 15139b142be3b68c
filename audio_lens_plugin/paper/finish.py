"""From the finished parts of a run to its tables, figures and report. No model is needed, only the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from audio_lens_plugin.audio import as_clip
from audio_lens_plugin.datasets import ClipSet
from audio_lens_plugin.multiple_choice import QuestionSet
from audio_lens_plugin.paper import figures
from audio_lens_plugin.paper.design import CLIP, LENS, Data
from audio_lens_plugin.paper.figures import Drawn
from audio_lens_plugin.paper.folder import RunFolder, write_table, write_whole
from audio_lens_plugin.paper.sections import about_section, examples_section, sections_of
from audio_lens_plugin.paper.tables import run_tables
from audio_lens_plugin.recipes.logit_lens import LensResult
from audio_lens_plugin.report import Section, first_of_each, write_report


def finish(run: RunFolder, data: Data) -> Path:
    """Write ``tables/``, ``figures/`` and ``report.html`` of a whole run; returns the path of the report.

    Args:
        data: the clips, to be played; the report has no sound of tracks that are not there.

    Raises:
        ResultError: units are missing.
    """
    tables = run_tables(run)
    for name, table in tables.items():
        write_table(run.path / "tables", name, table)
    forms = {subject.name: subject.causal for subject in run.identity.subjects if subject.causal}
    pictures = figures.keep(run.path / "figures", draw(tables, forms))
    sections = sections_of(run.identity, tables, pictures, forms)
    sections += [_examples(run, track, data.get(track)) for track in forms]
    sections.append(about_section(run.identity, run.clips))
    title = f"{run.identity.model}: the AudioLens paper"
    subtitle = f"{len(run.clips)} clips, {', '.join(forms)}. What the paper found, looked for in this model."
    report = write_whole(run.path / "report.html", lambda file: write_report(file, title, subtitle, sections))
    run.clear_unfinished()
    return report


def draw(tables: Mapping[str, pd.DataFrame], forms: Mapping[str, str]) -> Iterator[tuple[str, Drawn]]:
    """Every figure by its name, one at a time.

    Args:
        forms: the prompt form that is shown, by track.
    """
    yield "accuracy", figures.accuracy(tables["accuracy"])
    yield "information", figures.information(tables["information"], forms)
    yield "curves", figures.curves(tables["curves"], forms)
    yield "critical_layers", figures.critical_layers(_shown(tables["critical_layers"], forms))
    yield "attribute_share", figures.attribute_share(tables["attribute_share"], forms)
    yield "knockout", figures.knockout(tables["knockout"], forms)
    yield "grounding", figures.grounding(tables["grounding"])
    yield "enhancement", figures.enhancement(tables["enhancement"])
    words = tables.get("question_words", pd.DataFrame({"track": []}))
    for track, form in forms.items():
        yield f"forms_{track}", figures.forms_by_layer(tables["information"], track)
        if track in set(words["track"]):
            yield f"words_{track}", figures.question_words(words, track, form)
        yield f"knockout_{track}", figures.knockout_pairs(tables["knockout"], track)
        yield f"patching_{track}", figures.patching(tables["patching"], track)
        yield f"enhancement_{track}", figures.enhancement_grid(tables["enhancement_development"], track)


def _shown(table: pd.DataFrame, forms: Mapping[str, str]) -> pd.DataFrame:
    return table[table["track"].isin(list(forms))]


def _examples(run: RunFolder, track: str, clips: ClipSet | QuestionSet | None) -> Section:
    """The first clip that is answered rightly and the first that is not, in the form whose audio was read."""
    (subject,) = (subject for subject in run.identity.subjects if subject.name == track)
    result: LensResult = run.result(LENS, track, subject.forms[0], CLIP)
    places = first_of_each(result)
    indices = run.clips_of(track)["index"].tolist()
    heard = [None if clips is None else as_clip(clips.sources[indices[place]]) for place in places]
    return examples_section(result, track, list(zip(places, heard, strict=True)))

"""A report is one HTML file that needs nothing else: text, tables, figures and sounds are inside it.

A report is a list of sections, a section says something, shows it, and tells what it does not show.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
import soundfile

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Sample
from audio_lens_plugin.recipes.figure_style import save_figure
from audio_lens_plugin.recipes.logit_lens import LensResult
from audio_lens_plugin.recipes.scores import CellResult

TEMPLATE = Path(__file__).with_name("report.html.jinja")
CSS_INCH = 96.0
VERDICTS = {"held": "✓", "did not hold": "✗", "cannot be told": "?"}


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with the words for those who do not see it, and the clip it shows.

    Attributes:
        width: of the figure in its own size, in CSS pixels; a page does not draw it much smaller than that.
    """

    image: str
    alt: str
    caption: str
    width: float
    sound: str | None = None


@dataclass(frozen=True)
class Section:
    """One statement of a report and what carries it.

    Attributes:
        text: paragraphs; the first leads, so it says what is claimed.
        table: HTML, of `html_table` or `folded_table`.
        listing: text with its own line breaks.
        caveat: what is not shown.
        verdict: what became of the statement, as a badge: ``held``, ``did not hold`` or ``cannot be told``.
        group: neighbours of one group stand under its name in the list of contents.
        summary: a small table, HTML, that stands before the figures.

    Raises:
        ValueError: another verdict.
    """

    title: str
    text: tuple[str, ...] = ()
    table: str | None = None
    figures: tuple[Picture, ...] = ()
    listing: str = ""
    caveat: str = ""
    verdict: str = ""
    group: str = ""
    summary: str | None = None

    def __post_init__(self) -> None:
        if self.verdict and self.verdict not in VERDICTS:
            raise ValueError(f"{self.title}: {self.verdict!r} is no verdict; choose one of {', '.join(VERDICTS)}.")


def write_report(path: str | os.PathLike[str], title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Render sections into one self-contained HTML file."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    contents = [
        (name, list(entries)) for name, entries in groupby(enumerate(sections, 1), lambda entry: entry[1].group)
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        page.render(title=title, subtitle=subtitle, sections=sections, contents=contents, signs=VERDICTS),
        encoding="utf-8",
    )
    return path


def picture(figure: Any, alt: str, caption: str, clip: Clip | None = None) -> Picture:
    """A matplotlib figure as a `Picture`; the figure is closed."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, "svg")
    plt.close(figure)
    image = _data_uri(buffer.getvalue(), "image/svg+xml")
    width = figure.get_figwidth() * CSS_INCH
    return Picture(image, alt, caption, width, None if clip is None else _sound(clip))


def html_table(frame: pd.DataFrame) -> str:
    """A data frame as an HTML table, numbers with three decimals."""
    return frame.to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="–")


def folded_table(frame: pd.DataFrame) -> str:
    """A long table, folded until it is asked for; on paper it is open."""
    return f"<details><summary>Table, {len(frame)} rows</summary>{html_table(frame)}</details>"


def with_intervals(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """For people: numbers with their intervals in one column each, from ``low`` and ``high`` or ``<column>_low`` ..."""
    shown = frame.copy()
    for column in columns:
        ends = [f"{column}_low", f"{column}_high"] if f"{column}_low" in frame else ["low", "high"]
        numbers = zip(frame[column], *(frame[end] for end in ends), strict=True)
        shown[column] = [interval(value, low, high) for value, low, high in numbers]
        shown = shown.drop(columns=ends)
    return shown


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    """For people: a number with its interval; ``sign`` is ``+`` where numbers are changes."""
    if pd.isna(value):
        return "–"
    number, lowest, highest = (f"{value:{sign}z.2f}" for value in (value, low, high))
    return number if pd.isna(low) else f"{number} ({lowest} to {highest})"


def with_p(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """For people: p values with two digits."""
    return frame.assign(**{column: frame[column].map(p_value) for column in columns})


def p_value(p: float) -> str:
    """For people: a p value with two digits."""
    return "–" if pd.isna(p) else f"{p:.2g}"


def subtitle_of(result: LensResult | CellResult) -> str:
    """Model, numbers and versions of a result in one line."""
    header = result.header
    versions = ", ".join(f"{package} {number}" for package, number in header.versions.items())
    return f"{header.model}, {header.dtype}, {header.attention} attention, prompt form {header.form}. {versions}."


def lens_section(result: LensResult, title: str, examples: Sequence[tuple[int, Clip | None]] = ()) -> Section:
    """What the lens saw: scores and curves of all samples, then single clips, layer by layer.

    Args:
        examples: samples (by index) to show as heatmaps, with their clips where there are any.
    """
    score = result.information()
    at_last = score[(score["span"] == "last") & (score["layer"] > 0)]
    best = at_last.nlargest(1, "score").iloc[0]
    text = (
        f"Of {len(result.samples)} clips the model answers {result.accuracy:.0%} rightly "
        f"(chance {best['chance']:.0%}).",
        f"At the last position the information score is highest after "
        f"layer {int(best['layer'])}: {best['score']:.2f} (95 % interval {best['low']:.2f} to {best['high']:.2f}).",
        f"Critical layer: {result.critical_layer()}.",
    )
    figures = [
        picture(
            result.plot(),
            alt=f"{title}: information score by layer for {', '.join(result.spans)}, and probability of the true label "
            "by layer for right and wrong answers",
            caption="Left: share of clips whose true label is on top among the labels, with bootstrap intervals over "
            "clips. Right: probability of the true label, over clips answered rightly and wrongly.",
        )
    ]
    figures += example_pictures(result, examples)
    few = len(result.samples) < 50
    caveat = f"{len(result.samples)} clips are few: read the intervals, not the lines." if few else ""
    return Section(title, text, html_table(_score_table(score)), tuple(figures), caveat=caveat)


def example_pictures(result: LensResult, examples: Sequence[tuple[int, Clip | None]]) -> list[Picture]:
    """Single clips as heatmaps, layers by positions, with their waveform and their sound where these are there."""
    pictures = []
    for index, clip in examples:
        sample = result.samples.iloc[index]
        pictures.append(
            picture(
                result.plot_sample(index, clip=clip),
                alt=f"{sample['sample']}: probability of {sample['truth']} by layer and position",
                caption=f"{sample['sample']}: true label {sample['truth']}, the model says {sample['answer']}. "
                f"Probability of the true label by layer and position. {_about_time(result.positions(index), clip)}",
                clip=clip,
            )
        )
    return pictures


def _about_time(positions: pd.DataFrame, clip: Clip | None) -> str:
    """How to read the audio positions of a heatmap."""
    heard = positions[positions["audio"]]
    if heard.empty:
        return ""
    if heard["start"].notna().all():
        over = "" if clip is None else " Its waveform lies over the positions that hear it."
        return f"Seconds are those of the clip.{over}"
    over = "" if clip is None else " The waveform above them has its own seconds."
    return f"The audio positions are queries, which keep no time.{over}"


def first_of_each(result: LensResult) -> list[int]:
    """The first sample that is answered rightly and the first that is not, where there are such."""
    right = (result.samples["truth"] == result.samples["answer"]).tolist()
    return [right.index(outcome) for outcome in (True, False) if outcome in right]


def right_and_wrong(result: LensResult, samples: Sequence[Sample]) -> list[tuple[int, Clip | None]]:
    """Examples for `lens_section`: the first sample that is answered rightly and the first that is not."""
    return [(index, next(iter(samples[index].prompt.clips), None)) for index in first_of_each(result)]


def _score_table(score: pd.DataFrame) -> pd.DataFrame:
    """Information score, one line per layer and one column per span, with intervals."""
    cells = score.assign(
        cell=[
            f"{s:.2f} ({lo:.2f}–{hi:.2f})"
            for s, lo, hi in zip(score["score"], score["low"], score["high"], strict=True)
        ]
    )
    table = cells.pivot_table(index="layer", columns="span", values="cell", aggfunc="first", sort=False)
    return table.reset_index().rename_axis(columns=None)


def _sound(clip: Clip) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, clip.waveform, clip.rate, format="OGG", subtype="VORBIS")
    return _data_uri(buffer.getvalue(), "audio/ogg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

"""A toy's clips in SAKURA's published layout, with lettered questions: a data set for tests that need all of it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from audio_lens_plugin.datasets import toy_clips
from audio_lens_plugin.tracks import TRACKS

COLUMNS = ("file", "attribute_label", "single_instruction", "single_answer", "multi_instruction", "multi_answer")
OPTIONS = 4


def lay_out(folder: Path, toy: str = "toy/qwen2-audio") -> Path:
    """Write ``folder/data/<track>/metadata.csv`` beside ``audio/``, a folder per track.

    The questions have four options (two for Gender), and the traps of the published ones: capitalised Gender options,
    and answers with a space before them. The multi-hop question asks for the label's first three letters.
    """
    for track in TRACKS:
        _lay_out_track(folder / "data" / track, toy, track)
    return folder


def _lay_out_track(folder: Path, toy: str, track: str) -> None:
    clips = toy_clips(toy, track)
    (folder / "audio").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row, (name, source, label) in enumerate(zip(clips.names, clips.sources, clips.labels, strict=True)):
            shutil.copy(source, folder / "audio" / name)
            options = _options(clips.track.labels, label, row)
            shown = [option.capitalize() for option in options] if track == "Gender" else options
            spaces = " " * (row % 2)
            single = _asked(clips.track.question, shown, options.index(label))
            multi = _asked(
                "With which letters does it begin?", [option[:3] for option in options], options.index(label)
            )
            writer.writerow([name, label, single[0], spaces + single[1], multi[0], spaces + multi[1]])


def _options(labels: tuple[str, ...], label: str, row: int) -> list[str]:
    """Up to four labels, the true one at a place that moves with the row."""
    options = [other for other in labels if other != label][: min(OPTIONS, len(labels)) - 1]
    options.insert(row % (len(options) + 1), label)
    return options


def _asked(question: str, options: list[str], right: int) -> tuple[str, str]:
    """The question with its list, and the answer as it stands in that list."""
    listed = [f"({letter}) {option}" for letter, option in zip("abcd", options, strict=False)]
    return " ".join([question, *listed]), listed[right]

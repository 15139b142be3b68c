"""Clips with known labels, ready to be asked about: SAKURA as published, and any table of clips.

    sakura("SAKURA/data/Animal")                       the published layout: metadata.csv beside audio/
    table("clips.csv", "emotion", track="Emotion")     any CSV, JSONL or parquet with a path and a label column
    table(hf_dataset, "label", track="Gender")         a Hugging Face dataset with an audio column

A `ClipSet` knows its `Track`: which words ask for the attribute and which answers are possible. Clips are read one by
one when they are needed; that all of them are there is checked at once, before anything runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from audio_lens_plugin.audio import as_clip
from audio_lens_plugin.loading import toys
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.tracks import TRACKS, PromptForm, Track

PATH_COLUMNS = ("file", "file_name", "path", "audio")
# Cells are read as they are written: "None" and "NA" are words, too, and only an empty cell is nothing.
AS_WRITTEN: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
READERS: dict[str, Any] = {
    ".csv": lambda path: pd.read_csv(path, **AS_WRITTEN),
    ".tsv": lambda path: pd.read_csv(path, sep="\t", **AS_WRITTEN),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


class DatasetError(ValueError):
    """A table that does not describe clips with labels; the message names file and rows."""


@dataclass(frozen=True)
class ClipSet:
    """Recordings with labels of one track.

    Attributes:
        name: for headers and messages.
        track: how the attribute is asked for.
        names: one name per clip.
        sources: what `as_clip` takes, one per clip.
        labels: the true label of each clip, as the track writes it.
    """

    name: str
    track: Track
    names: tuple[str, ...]
    sources: Sequence[Any]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def samples(self, form: PromptForm | str = "open+is") -> Samples:
        """Every clip asked about in this form; clips are read when a sample is taken."""
        return Samples(self, PromptForm.parse(form) if isinstance(form, str) else form)


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """A clip set in one prompt form: a sequence of `Sample`."""

    clips: ClipSet
    form: PromptForm

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        track = self.clips.track
        prompt = Prompt(
            clips=(as_clip(self.clips.sources[index]),) if self.form.audio else (),
            question=self.form.question(track),
            options=self.form.options(track),
            answer=self.form.answer(track),
            attribute=track.attribute,
        )
        return Sample(self.clips.names[index], prompt, self.clips.labels[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def sakura(folder: str | os.PathLike[str]) -> ClipSet:
    """One SAKURA track as published: ``metadata.csv`` with ``file`` (or ``file_name``) and ``attribute_label``, beside
    ``audio/``. The folder's name is the track's.

    Raises:
        DatasetError: no such track, no metadata, a missing file or an unknown label (with its row).
    """
    folder = Path(folder)
    if folder.name not in TRACKS:
        raise DatasetError(f"{folder} is no SAKURA track: its name must be one of {', '.join(TRACKS)}.")
    frame = _read(folder / "metadata.csv")
    return _from_frame(frame, folder / "audio", "attribute_label", TRACKS[folder.name], str(folder / "metadata.csv"))


def table(source: Any, label: str, track: Track | str) -> ClipSet:
    """Any table of clips.

    Args:
        source: a CSV, TSV, JSONL or parquet file with a column of paths (``file``, ``file_name``, ``path`` or
            ``audio``; relative ones start at the table's folder, or at ``audio/`` in it), a data frame with absolute
            paths, or a Hugging Face dataset with an ``audio`` column.
        label: the column of labels.
        track: how the attribute is asked for: a `Track`, or the name of one of SAKURA's four.

    Raises:
        DatasetError: a missing column, file or label (with its row).
    """
    track = _track(track)
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, Path(), label, track, "data frame")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _from_frame(_read(path), path.parent, label, track, str(path))
    return _from_hugging_face(source, label, track)


def toy_clips(toy: str, track: str) -> ClipSet:
    """The held-out clips that ship with a toy, those that have a label of this track.

    Args:
        toy: the toy's name, as in `loading.load`.
        track: one of SAKURA's four.

    Raises:
        DatasetError: there is no such toy or track.
    """
    if toy not in toys() or track not in TRACKS:
        raise DatasetError(
            f"no clips of {toy!r} for {track!r}; toys: {', '.join(toys())}; tracks: {', '.join(TRACKS)}."
        )
    path = toys()[toy] / "clips" / "metadata.csv"
    frame = _read(path)
    column = TRACKS[track].attribute
    return _from_frame(frame[frame[column].notna()], path.parent, column, TRACKS[track], str(path))


def _track(track: Track | str) -> Track:
    if isinstance(track, Track):
        return track
    if track not in TRACKS:
        raise DatasetError(f"{track!r} is no known track ({', '.join(TRACKS)}); describe yours with a Track.")
    return TRACKS[track]


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file.")
    if path.suffix not in READERS:
        raise DatasetError(f"{path}: a table of clips is one of {', '.join(READERS)}.")
    try:
        return READERS[path.suffix](path)
    except (ValueError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _from_frame(frame: pd.DataFrame, folder: Path, label: str, track: Track, name: str) -> ClipSet:
    columns = [column for column in PATH_COLUMNS if column in frame.columns]
    if not columns:
        raise DatasetError(
            f"{name}: no column of paths; one of {', '.join(PATH_COLUMNS)} is needed, "
            f"there are {', '.join(map(str, frame.columns))}."
        )
    if label not in frame.columns:
        raise DatasetError(f"{name}: no column {label!r}; there are {', '.join(map(str, frame.columns))}.")
    if frame.empty:
        raise DatasetError(f"{name}: there are no clips in it.")
    files = [str(value).strip() for value in frame[columns[0]]]
    paths = [_find(folder, file) for file in files]
    missing = [f"row {place + 1}: {files[place]}" for place, path in enumerate(paths) if path is None]
    if missing:
        shown = "\n  ".join(missing[:10]) + (f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise DatasetError(f"{name}: {len(missing)} of {len(files)} clips are not in {folder}:\n  {shown}")
    labels = _labels(list(frame[label]), track, name)
    return ClipSet(name, track, tuple(files), tuple(paths), labels)


def _find(folder: Path, file: str) -> Path | None:
    for path in (folder / file, folder / "audio" / file):
        if path.is_file():
            return path
    return None


def _labels(values: Sequence[Any], track: Track, name: str) -> tuple[str, ...]:
    """Labels as the track writes them; spaces around them and their case do not count."""
    known = {label.casefold(): label for label in track.labels}
    cleaned = [str(value).strip().casefold() for value in values]
    unknown = [f"row {row}: {values[row - 1]!r}" for row, label in enumerate(cleaned, 1) if label not in known]
    if unknown:
        raise DatasetError(
            f"{name}: {len(unknown)} labels are none of {', '.join(track.labels)}: {'; '.join(unknown[:10])}."
        )
    return tuple(known[label] for label in cleaned)


def _from_hugging_face(dataset: Any, label: str, track: Track) -> ClipSet:
    columns = list(getattr(dataset, "column_names", None) or [])
    for column in ("audio", label):
        if column not in columns:
            raise DatasetError(f"the dataset has no column {column!r}; there are {', '.join(columns) or 'none'}.")
    from datasets import Audio

    clips = list(dataset.cast_column("audio", Audio(decode=False))["audio"])
    _check_clips(clips)
    feature = dataset.features[label]
    values = [_class_name(feature, value) for value in dataset[label]]
    names = [os.path.basename(str(clip.get("path") or f"row {row}")) for row, clip in enumerate(clips, 1)]
    return ClipSet("dataset", track, tuple(names), clips, _labels(values, track, "dataset"))


def _check_clips(clips: Sequence[dict[str, Any] | None]) -> None:
    """Every row has sound in it, or a path that leads to some."""
    silent = [
        f"row {row}"
        for row, clip in enumerate(clips, 1)
        if not clip or (clip.get("bytes") is None and not os.path.isfile(clip.get("path") or ""))
    ]
    if silent or not clips:
        told = f"{len(silent)} rows have no audio: {', '.join(silent[:10])}" if clips else "there are no clips in it"
        raise DatasetError(f"dataset: {told}.")


def _class_name(feature: Any, value: Any) -> Any:
    """A label in words, where the column holds class numbers; a missing one (None, -1) as it is."""
    if not hasattr(feature, "int2str") or value is None or value < 0:
        return value
    return feature.int2str(value)

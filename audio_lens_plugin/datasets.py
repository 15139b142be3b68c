"""Clips with known labels, ready to be asked about: SAKURA as published, and any table of clips.

    sakura("SAKURA/data/Animal")                       the published layout: metadata.csv beside audio/
    table("clips.csv", "emotion", track="Emotion")     any CSV, JSONL or parquet with a path and a label column
    table(hf_dataset, "label", track="Gender")         a Hugging Face dataset with an audio column
    sakura_tracks("SAKURA")                            every track that is there, by its name

A `ClipSet` knows its `Track`: which words ask for the attribute and which answers are possible. Clips are read one by
one when they are needed; that all of them are there is checked at once, before anything runs. Multiple-choice questions
about clips (`audio_lens_plugin.multiple_choice`) are `Recordings`, too: whoever runs an experiment treats both alike.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from audio_lens_plugin.audio import as_clip, digest_of, seconds_of
from audio_lens_plugin.loading import toys
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.tracks import TRACKS, Attribute, PromptForm, Track

PATH_COLUMNS = ("file", "file_name", "path", "audio")
# Cells are read as they are written: "None" and "NA" are words, too, and only an empty cell is nothing.
AS_WRITTEN: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
READERS: dict[str, Any] = {
    ".csv": lambda path: pd.read_csv(path, **AS_WRITTEN),
    ".tsv": lambda path: pd.read_csv(path, sep="\t", **AS_WRITTEN),
    ".json": lambda path: pd.read_json(path, dtype=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}
SHOWN_ROWS = 10
# File names that tell whose voice is heard: CREMA-D's speakers, MELD's dialogues (the same voices in all of one).
SPEAKERS = {
    "speaker": re.compile(r"(\d{4})_[A-Z]{3}_[A-Z]{3}_[A-Z]{2}\."),
    "dialogue": re.compile(r"dia(\d+)_utt\d+\."),
}


class DatasetError(ValueError):
    """A table that does not describe clips with labels; the message names file and rows."""


@dataclass(frozen=True)
class Recordings:
    """Clips whose right answer is known: what all data sets have in common.

    Attributes:
        name: for headers and messages.
        track: what is asked about all of them: its name, and the answers that are possible.
        names: one name per row.
        sources: what `as_clip` takes, one per row.
        labels: the true answer of each row, as the track writes it.
    """

    name: str
    track: Attribute
    names: tuple[str, ...]
    sources: Sequence[Any]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def seconds(self) -> tuple[float, ...]:
        """Duration of each row's clip in seconds; nothing is decoded."""
        return tuple(seconds_of(source) for source in self.sources)

    def groups(self) -> tuple[str, ...]:
        """What each row shares with others that must not be divided from it: the speaker where the file's name tells
        (`speaker_of`), else the clip itself."""
        return tuple(speaker_of(name) or name for name in self._clip_names())

    def digest(self) -> str:
        """A content hash of all rows: their words and the bytes of their clips, in order."""
        total = hashlib.sha256()
        for index, source in enumerate(self.sources):
            total.update(repr((*self._words(index), digest_of(source))).encode())
        return total.hexdigest()[:16]

    def _clip_names(self) -> tuple[str, ...]:
        return self.names

    def _words(self, index: int) -> tuple[str, ...]:
        return self.names[index], self.labels[index]


@dataclass(frozen=True)
class ClipSet(Recordings):
    """Recordings with labels of one track, which says how the attribute is asked for. Fields: see `Recordings`."""

    track: Track

    @property
    def forms(self) -> tuple[str, ...]:
        """The prompt forms in which the clips can be asked about."""
        return tuple(str(form) for form in PromptForm.all())

    def samples(self, form: PromptForm | str = "open+is") -> Samples:
        """Every clip asked about in this form; clips are read when a sample is taken."""
        return Samples(self, partial(self._ask, PromptForm.parse(form) if isinstance(form, str) else form))

    def _ask(self, form: PromptForm, index: int) -> Prompt:
        return Prompt(
            clips=(as_clip(self.sources[index]),) if form.audio else (),
            question=form.question(self.track),
            options=form.options(self.track),
            answer=form.answer(self.track),
            attribute=self.track.attribute,
        )


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Recordings in one prompt form: a sequence of `Sample`. ``ask`` makes the prompt of a row."""

    recordings: Recordings
    ask: Callable[[int], Prompt]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return Sample(self.recordings.names[index], self.ask(index), self.recordings.labels[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def speaker_of(name: str) -> str | None:
    """Who speaks in a clip, where its file name tells.

    Args:
        name: ``1019_TSI_SAD_XX.wav`` (CREMA-D) is "speaker 1019"; ``dia113_utt8.wav`` (MELD) is "dialogue 113".

    Returns:
        None for any other name.
    """
    file = os.path.basename(name)
    found = {kind: pattern.match(file) for kind, pattern in SPEAKERS.items()}
    return next((f"{kind} {match[1]}" for kind, match in found.items() if match), None)


def sakura(folder: str | os.PathLike[str]) -> ClipSet:
    """One SAKURA track as published: ``metadata.csv`` with ``file`` (or ``file_name``) and ``attribute_label``, beside
    ``audio/``. The folder's name is the track's.

    Raises:
        DatasetError: no such track, no metadata, a missing file or an unknown label (with its row).
    """
    folder = Path(folder)
    if folder.name not in TRACKS:
        raise DatasetError(f"{folder} is no SAKURA track: its name must be one of {', '.join(TRACKS)}.")
    frame = read_table(folder / "metadata.csv")
    return _from_frame(frame, folder / "audio", "attribute_label", TRACKS[folder.name], str(folder / "metadata.csv"))


def sakura_tracks(folder: str | os.PathLike[str]) -> dict[str, ClipSet]:
    """Every SAKURA track that is there, by its name.

    Args:
        folder: SAKURA as published (its tracks are in ``data/``), or the folder of the tracks itself.

    Raises:
        DatasetError: none of the four is there; or a track is not as `sakura` needs it.
    """
    return {path.name: sakura(path) for path in track_folders(Path(folder))}


def track_folders(folder: Path) -> list[Path]:
    """The folders of SAKURA's tracks in ``folder/data``, or in ``folder`` itself.

    Raises:
        DatasetError: none is there.
    """
    for home in (folder / "data", folder):
        found = [home / track for track in TRACKS if (home / track).is_dir()]
        if found:
            return found
    raise DatasetError(f"{folder}: no SAKURA track is in it or in its data/; there is none of {', '.join(TRACKS)}.")


def table(source: Any, label: str, track: Track | str) -> ClipSet:
    """Any table of clips.

    Args:
        source: a CSV, TSV, JSON, JSONL or parquet file with a column of paths (``file``, ``file_name``, ``path`` or
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
        return _from_frame(read_table(path), path.parent, label, track, str(path))
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
    frame = read_table(path)
    column = TRACKS[track].attribute
    return _from_frame(frame[frame[column].notna()], path.parent, column, TRACKS[track], str(path))


def toy_tracks(toy: str) -> dict[str, ClipSet]:
    """The held-out clips that ship with a toy, by the name of their track.

    Raises:
        DatasetError: there is no such toy.
    """
    return {track: toy_clips(toy, track) for track in TRACKS}


def _track(track: Track | str) -> Track:
    if isinstance(track, Track):
        return track
    if track not in TRACKS:
        raise DatasetError(f"{track!r} is no known track ({', '.join(TRACKS)}); describe yours with a Track.")
    return TRACKS[track]


def read_table(path: Path) -> pd.DataFrame:
    """A table of any kind that is known by its suffix; cells are read as they are written.

    Raises:
        DatasetError: there is no such file, or it is no such table.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file.")
    if path.suffix not in READERS:
        raise DatasetError(f"{path}: a table of clips is one of {', '.join(READERS)}.")
    try:
        return READERS[path.suffix](path)
    except (ValueError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _from_frame(frame: pd.DataFrame, folder: Path, label: str, track: Track, name: str) -> ClipSet:
    column = column_of(frame, PATH_COLUMNS, "paths", name)
    if label not in frame.columns:
        raise DatasetError(f"{name}: no column {label!r}; there are {', '.join(map(str, frame.columns))}.")
    files, paths = find_clips(frame[column], folder, name)
    return ClipSet(name, track, files, paths, _labels(list(frame[label]), track, name))


def column_of(frame: pd.DataFrame, names: Sequence[str], what: str, table: str) -> str:
    """The first of these columns that a table has.

    Raises:
        DatasetError: it has none.
    """
    for name in names:
        if name in frame.columns:
            return name
    there = ", ".join(map(str, frame.columns))
    raise DatasetError(f"{table}: no column of {what}; one of {', '.join(names)} is needed, there are {there}.")


def find_clips(values: Sequence[Any] | pd.Series, folder: Path, name: str) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The files that a column names, as written and as paths; relative ones are in ``folder`` or its ``audio/``.

    Raises:
        DatasetError: there are no rows, or files are missing (with their rows).
    """
    files = tuple(str(value).strip() for value in values)
    if not files:
        raise DatasetError(f"{name}: there are no clips in it.")
    paths = [_find(folder, file) for file in files]
    missing = [f"row {row}: {file}" for row, (file, path) in enumerate(zip(files, paths, strict=True), 1) if not path]
    if missing:
        raise DatasetError(f"{name}: {len(missing)} of {len(files)} clips are not in {folder}:{listed(missing)}")
    return files, tuple(path for path in paths if path)


def listed(rows: Sequence[str]) -> str:
    """Rows of a message below each other; of many, the first ones."""
    more = [f"... and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []
    return "".join(f"\n  {row}" for row in [*rows[:SHOWN_ROWS], *more])


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
    names, clips = hugging_face_clips(dataset, label)
    return ClipSet("dataset", track, names, clips, _labels(words_of(dataset, label), track, "dataset"))


def hugging_face_clips(dataset: Any, *further: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Names and undecoded clips of a Hugging Face dataset's ``audio`` column.

    Raises:
        DatasetError: it lacks that column or one of the ``further`` ones, or rows have no audio.
    """
    columns = list(getattr(dataset, "column_names", None) or [])
    for column in ("audio", *further):
        if column not in columns:
            raise DatasetError(f"the dataset has no column {column!r}; there are {', '.join(columns) or 'none'}.")
    from datasets import Audio

    clips = list(dataset.cast_column("audio", Audio(decode=False))["audio"])
    _check_clips(clips)
    names = (os.path.basename(str(clip.get("path") or f"row {row}")) for row, clip in enumerate(clips, 1))
    return tuple(names), clips


def words_of(dataset: Any, column: str) -> list[Any]:
    """A column of a Hugging Face dataset, class numbers as words."""
    feature = dataset.features[column]
    return [_class_name(feature, value) for value in dataset[column]]


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

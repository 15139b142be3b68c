"""The folder of a run: what it is a run of, and which of its units are finished.

    RUN/run.json            model, data, settings, versions: all that decides the numbers
    RUN/clips.parquet       the clips, in the order in which they are batched
    RUN/parts/...           one folder per finished unit
    RUN/tables, figures, report.html      made of the parts, when all of them are there

Everything appears whole or not at all: it is written under a name that begins with a dot and then renamed. So a run may
be killed at any moment, started again, and shared by several processes on one file system.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.paper.design import Settings, Subject, Unit, units
from audio_lens_plugin.paper.experiments import KINDS
from audio_lens_plugin.recipes.engine import Part
from audio_lens_plugin.recipes.figure_style import save_figure
from audio_lens_plugin.results import ResultError, package_versions

RUN = "run.json"


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of a run: equal identity, equal tables.

    Attributes:
        model: repo id, folder or toy.
        revision: commit or branch of the checkpoint, if known.
        weights: fingerprint of configuration and weights.
        dtype: of the weights.
        attention: the implementation that ran.
        layers: number of blocks of the language model.
        data: a hash of the clips, their names and their labels.
        subjects: what is asked about them.
        settings: what was chosen.
        split: how the clips are divided for the enhancement.
        versions: of the packages.
    """

    model: str
    revision: str | None
    weights: str
    dtype: str
    attention: str
    layers: int
    data: str
    subjects: tuple[Subject, ...]
    settings: Settings
    split: str
    versions: dict[str, str]

    @classmethod
    def of(cls, lalm: LALM, data: str, subjects: Sequence[Subject], settings: Settings) -> Identity:
        """The identity of a run of this model."""
        return cls(
            model=lalm.name,
            revision=lalm.revision,
            weights=lalm.fingerprint,
            dtype=str(lalm.dtype).removeprefix("torch."),
            attention=lalm.attention,
            layers=lalm.n_layers,
            data=data,
            subjects=tuple(subjects),
            settings=settings,
            split=f"{settings.development:.0%} of the clips choose the enhancement, drawn with seed {settings.seed} "
            "within each label; clips of one speaker, where file names tell, are on one side",
            versions=package_versions(),
        )

    @classmethod
    def from_json(cls, text: str) -> Identity:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        fields["settings"] = Settings(**fields["settings"])
        fields["subjects"] = tuple(
            Subject(**{**subject, **{name: tuple(subject[name]) for name in ("labels", "forms", "free")}})
            for subject in fields["subjects"]
        )
        return cls(**fields)

    def to_json(self) -> str:
        """For people and programs."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def check_same(self, other: Identity, where: Path) -> None:
        """Refuse to mix the numbers of two runs.

        Raises:
            ResultError: they differ; the message says in what.
        """
        mine, others = asdict(self), asdict(other)
        differing = [name for name, value in mine.items() if value != others[name]]
        if differing:
            raise ResultError(
                f"{where} is a run of something else: it differs in {', '.join(differing)}. "
                "Choose another folder, or delete this one."
            )


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path
    identity: Identity
    clips: pd.DataFrame

    @classmethod
    def begin(cls, path: Path, identity: Identity, clips: pd.DataFrame) -> RunFolder:
        """Start a run, or go on with one of the same identity.

        Raises:
            ResultError: the folder holds another run, or something that is none.
        """
        if not (path / RUN).exists():
            if path.exists() and any(
                not item.name.startswith(".") for item in path.iterdir() if item.name != "clips.parquet"
            ):
                raise ResultError(f"{path} holds something that is no run; choose another folder.")
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / "clips.parquet", lambda file: clips.to_parquet(file, index=False))
            write_whole(path / RUN, lambda file: file.write_text(identity.to_json(), encoding="utf-8"))
        run = cls.open(path)
        identity.check_same(run.identity, path)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Read a run that was begun.

        Raises:
            ResultError: there is none.
        """
        if not (path / RUN).is_file():
            raise ResultError(f"{path} holds no run: there is no {RUN} in it.")
        identity = Identity.from_json((path / RUN).read_text(encoding="utf-8"))
        return cls(path, identity, pd.read_parquet(path / "clips.parquet"))

    @property
    def units(self) -> list[Unit]:
        """All units of the run, finished or not."""
        return units(self.identity.subjects, self.identity.settings.batch_size)

    @property
    def missing(self) -> list[Unit]:
        """The units that are not finished."""
        return [unit for unit in self.units if not self.part(unit).is_dir()]

    def part(self, unit: Unit) -> Path:
        """Where the result of a unit lies."""
        return self.path / "parts" / unit.place

    def clips_of(self, track: str) -> pd.DataFrame:
        """The clips of a track, in the order of their batches."""
        return self.clips[self.clips["track"] == track].reset_index(drop=True)

    def result(self, experiment: str, track: str, form: str, control: str) -> Any:
        """The finished batches of one question, joined, clips in the order of `clips_of`."""
        kind: type[Part] = KINDS[experiment][0]
        batches = ceil(len(self.clips_of(track)) / self.identity.settings.batch_size)
        mine = [Unit(experiment, track, form, control, batch) for batch in range(batches)]
        return kind.concat([kind.load(self.part(unit)) for unit in mine])

    def take(self, other: RunFolder) -> int:
        """Copy finished units of a shard that ran in a folder of its own; returns how many were new.

        Raises:
            ResultError: it is a run of something else.
        """
        self.identity.check_same(other.identity, other.path)
        new = [unit for unit in self.missing if other.part(unit).is_dir()]
        for unit in new:
            place = self.part(unit)
            copy = place.with_name(f".{place.name}-{os.getpid()}")
            shutil.copytree(other.part(unit), copy)
            copy.rename(place)
        return len(new)

    def check_whole(self) -> None:
        """All units are finished.

        Raises:
            ResultError: some are not; the message says how many and which.
        """
        if missing := self.missing:
            first = missing[0]
            raise ResultError(
                f"{self.path}: {len(missing)} of {len(self.units)} batches are missing, the first is "
                f"{first.experiment} of {first.track}, {first.form}, {first.control}, batch {first.batch}. "
                "Start the shards that did not end once more, or the same command without --shard."
            )

    def clear_unfinished(self) -> None:
        """Remove what killed processes left half written; only when nothing else runs in this folder."""
        for left in [*self.path.glob(".*"), *self.path.glob("parts/**/.*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    write(unfinished)
    unfinished.replace(path)
    return path


def write_table(folder: Path, name: str, table: pd.DataFrame) -> Path:
    """A table as parquet, whole or not at all."""
    return write_whole(folder / f"{name}.parquet", lambda file: table.to_parquet(file, index=False))


def write_figure(folder: Path, name: str, figure: Figure) -> None:
    """A figure as SVG and PNG, whole or not at all."""

    def save(file: Path) -> None:
        with file.open("wb") as opened:
            save_figure(figure, opened, "svg" if file.suffix == ".svg" else "png")

    for kind in ("svg", "png"):
        write_whole(folder / f"{quote(name, safe=' ()')}.{kind}", save)

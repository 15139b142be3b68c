"""A run that is small enough to be made several times: one track, four clips of a toy, batches of two."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from audio_lens_plugin.datasets import ClipSet, toy_clips
from audio_lens_plugin.paper.design import Settings

TOY = "toy/qwen2-audio"
SETTINGS = Settings(batch_size=2, seed=3)


def four_clips() -> dict[str, ClipSet]:
    clips = toy_clips(TOY, "Gender")
    men, women = ([place for place, label in enumerate(clips.labels) if label == one][:2] for one in ("male", "female"))
    places = sorted(men + women)
    fields = {name: tuple(getattr(clips, name)[place] for place in places) for name in ("names", "sources", "labels")}
    return {"Gender": replace(clips, **fields)}


def four_questions(folder: Path) -> Path:
    """Questions as MMAU writes them, about three of the four clips; the first clip is asked about twice."""
    clips = four_clips()["Gender"]
    rows = []
    for row, place in enumerate((0, 0, 1, 2)):
        shutil.copy(clips.sources[place], folder / clips.names[place])
        options = ["male", "female"] if row % 2 else ["female", "male"]
        question = "Who speaks?" if row else "What is the gender of the speaker in the speech?"
        rows.append(
            {"audio_id": clips.names[place], "question": question, "choices": options, "answer": clips.labels[place]}
        )
    path = folder / "voices.json"
    path.write_text(json.dumps(rows))
    return path


def table_bytes(run: Path, tables: int = 15) -> dict[str, bytes]:
    """Every table of a run, as it lies on disk."""
    found = {path.name: path.read_bytes() for path in sorted((run / "tables").glob("*.parquet"))}
    assert len(found) == tables
    return found

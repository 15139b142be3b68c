"""A run that is small enough to be made several times: one track, four clips of a toy, batches of two."""

from __future__ import annotations

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


def table_bytes(run: Path) -> dict[str, bytes]:
    """Every table of a run, as it lies on disk."""
    found = {path.name: path.read_bytes() for path in sorted((run / "tables").glob("*.parquet"))}
    assert len(found) == 14
    return found

"""The engine room with a recipe that only counts: order, storage, keys, memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.prompts import Prompt, Sample
from audio_lens_plugin.recipes.engine import Desk, part_key, sweep
from audio_lens_plugin.results import Header

HEADER = Header("names", "model", None, "weights", "float32", "sdpa", "custom", ("yes", "no"))


@dataclass
class Names:
    """A part that holds the names of its samples."""

    names: list[str]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True)
        (folder / "names").write_text("\n".join(self.names))
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Names:
        return cls((Path(folder) / "names").read_text().split("\n"))

    @classmethod
    def concat(cls, parts: Sequence[Names]) -> Names:
        return cls([name for part in parts for name in part.names])


def sample(name: str, loudness: float = 0.1, label: str = "yes", **words) -> Sample:
    clip = Clip(np.full(100, loudness, dtype=np.float32), 16_000, name)
    return Sample(name, Prompt(clips=(clip,), **words), label)


def run(compute, samples, folder=None, batch_size=3) -> Names:
    return sweep(samples, compute, Names, header=HEADER, batch_size=batch_size, folder=folder, progress=False)


def names_of(samples: Sequence[Sample], desk: Desk) -> Names:
    return Names([sample.name for sample in samples])


def test_batches_come_in_order_and_none_is_lost() -> None:
    sizes = []

    def compute(samples, desk):
        sizes.append(len(samples))
        return names_of(samples, desk)

    samples = [sample(str(index)) for index in range(7)]
    assert run(compute, samples).names == [str(index) for index in range(7)]
    assert sizes == [3, 3, 1]


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    sizes = []

    def compute(samples, desk):
        sizes.append(len(samples))
        if len(samples) > 2:
            raise torch.OutOfMemoryError("too large")
        return names_of(samples, desk)

    assert run(compute, [sample(str(index)) for index in range(8)], batch_size=8).names == [str(i) for i in range(8)]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    def compute(samples, desk):
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        run(compute, [sample("a")])


def test_finished_batches_are_not_computed_again(tmp_path: Path) -> None:
    samples = [sample(str(index)) for index in range(5)]
    first = run(names_of, samples, tmp_path)
    second = run(lambda samples, desk: pytest.fail("computed again"), samples, tmp_path)
    assert first == second


def test_an_error_in_a_batch_keeps_those_before_it(tmp_path: Path) -> None:
    samples = [sample(str(index)) for index in range(6)]

    def fails_late(batch, desk):
        if batch[0].name == "3":
            raise RuntimeError("dead")
        return names_of(batch, desk)

    with pytest.raises(RuntimeError, match="dead"):
        run(fails_late, samples, tmp_path)
    computed = []
    run(lambda batch, desk: computed.append(len(batch)) or names_of(batch, desk), samples, tmp_path)
    assert computed == [3]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        run(names_of, [])


@pytest.mark.parametrize(
    ("header", "other"),
    [
        (HEADER, sample("a", loudness=0.2)),
        (HEADER, sample("a", label="no")),
        (HEADER, sample("b")),
        (HEADER, sample("a", question="What?")),
        (HEADER, sample("a", answer="It is")),
        (HEADER, sample("a", options=("yes", "no"))),
        (replace(HEADER, weights="other"), sample("a")),
        (replace(HEADER, dtype="bfloat16"), sample("a")),
        (replace(HEADER, options={"top_k": 1}), sample("a")),
    ],
)
def test_whatever_decides_the_numbers_decides_the_key(header: Header, other: Sample) -> None:
    assert part_key(HEADER, [sample("a")]) == part_key(HEADER, [sample("a")])
    assert part_key(header, [other]) != part_key(HEADER, [sample("a")])

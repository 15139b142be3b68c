"""Make a toy: ``python -m audio_lens_plugin.toy_shelf.training TOY --work SCRATCH``, within the hour on two cores.

In order: make the clips, learn to hear, learn to read, save the checkpoint as half-precision numbers, load it again as
a user would, measure it on held-out clips, pick the clips that are shipped with it and write its model card. What
takes minutes is kept in the work folder, so that a second run goes on where the first one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import torch
import typer

from audio_lens_plugin.loading import SHELF, load
from audio_lens_plugin.toy_shelf.card import FORMS, write_card
from audio_lens_plugin.toy_shelf.desta2 import Desta2Toy
from audio_lens_plugin.toy_shelf.family import Toy
from audio_lens_plugin.toy_shelf.qwen2_audio import Qwen2AudioToy
from audio_lens_plugin.toy_shelf.qwen_audio import QwenAudioToy
from audio_lens_plugin.toy_shelf.shipping import ship_clips
from audio_lens_plugin.toy_shelf.sounds import make_clips
from audio_lens_plugin.toy_shelf.stages import Pool, embedding_pool, feature_pool, learn_to_hear, learn_to_read

SHORT_SECONDS, LONG_SECONDS = (0.5, 3.0), (3.0, 6.0)
REST_CLIPS = 800
LONG_CLIPS = 0.125  # long clips per short clip
TOYS: dict[str, type[Toy]] = {"qwen2-audio": Qwen2AudioToy, "qwen-audio": QwenAudioToy, "desta2": Desta2Toy}

Made = TypeVar("Made")


def kept(path: Path, make: Callable[[], Made]) -> Made:
    """What is stored at `path`; made and stored if there is nothing yet."""
    if not path.exists():
        print(f"making {path.name}", flush=True)
        torch.save(make(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    with torch.serialization.safe_globals([Pool]):
        return torch.load(path)


def training_pools(toy: Toy, clips: int, seed: int) -> list[Pool]:
    """The features of the clips to learn from: short ones, and a few long ones."""
    short = make_clips(clips, seed, seconds=SHORT_SECONDS)
    long = make_clips(int(LONG_CLIPS * clips), seed + 1, seconds=LONG_SECONDS)
    return [feature_pool(toy, short, SHORT_SECONDS[1]), feature_pool(toy, long, LONG_SECONDS[1])]


def train(toy: Toy, work: Path, clips: int, hearing_steps: int, reading_steps: int, seed: int) -> None:
    """Both stages, each kept in the work folder."""
    pools = kept(work / "clips.pt", lambda: training_pools(toy, clips, seed))
    check = feature_pool(toy, make_clips(400, seed + 2), SHORT_SECONDS[1])

    def hear() -> dict[str, torch.Tensor]:
        learn_to_hear(toy, pools, check, hearing_steps, seed)
        return toy.hearing().state_dict()

    def read() -> dict[str, torch.Tensor]:
        learn_to_read(toy, [embedding_pool(toy, pool) for pool in pools], reading_steps, seed)
        return toy.reading().state_dict()

    toy.hearing().load_state_dict(kept(work / "hearing.pt", hear))
    toy.reading().load_state_dict(kept(work / "reading.pt", read))
    toy.finished(make_clips(REST_CLIPS, seed + 3), seed)


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TOYS)}.")],
    work: Annotated[Path, typer.Option(help="A folder for intermediate states; a second run goes on from them.")],
    clips: Annotated[int, typer.Option(help="Short clips to learn from.")] = 8000,
    hearing_steps: Annotated[int, typer.Option(help="Steps of stage 1.")] = 1000,
    reading_steps: Annotated[int, typer.Option(help="Steps of stage 2.")] = 500,
    seed: int = 1,
) -> None:
    """Make a toy: train it, measure it, put it on the shelf."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    toy = TOYS[name].untrained()
    train(toy, work, clips, hearing_steps, reading_steps, seed)
    command = (
        f"python -m audio_lens_plugin.toy_shelf.training {name} --work SCRATCH --clips {clips} "
        f"--hearing-steps {hearing_steps} --reading-steps {reading_steps} --seed {seed}"
    )
    facts: dict[str, Any] = dict(name=f"toy/{name}", about=toy.about, history=toy.history, command=command)
    facts |= dict(clips=clips, long_clips=int(LONG_CLIPS * clips))
    facts |= dict(hearing_steps=hearing_steps, reading_steps=reading_steps)
    with TemporaryDirectory(dir=work) as new:
        toy.save(Path(new))
        saved = load(new)
        shipped = ship_clips(saved, Path(new) / "clips", FORMS[0], seed + 20)
        (Path(new) / "README.md").write_text(write_card(saved, seed + 30, shipped, facts))
        publish(Path(new), SHELF / name)
    print((SHELF / name / "README.md").read_text())


def publish(new: Path, out: Path) -> None:
    """Put the finished files in the toy's folder, each in one move."""
    for file in [path for path in new.rglob("*") if path.is_file()]:
        target = out / file.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target.with_name(f".{target.name}"))
        target.with_name(f".{target.name}").replace(target)


if __name__ == "__main__":
    typer.run(main)

"""How a toy learns: first to hear, then to read.

Trained end to end from nothing, a toy does not find out within an hour that the clip matters. In two stages it does:

1. *Hearing.* The audio part alone, its embeddings averaged over a clip, with one linear head per track on top. The
   heads are thrown away afterwards.
2. *Reading.* The text stack alone, on the audio embeddings of stage 1, which are computed once. The prompt is every
   form of `audio_lens_plugin.tracks` that plays the clip; the loss counts on the answer's tokens, most on the label.

Clips come in two pools: many short ones, and a few that need the whole window. Each batch is drawn from one pool.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from audio_lens_plugin.toy_shelf.family import Toy
from audio_lens_plugin.toy_shelf.prompts import Prompts
from audio_lens_plugin.toy_shelf.sounds import LabelledSound
from audio_lens_plugin.tracks import TRACKS

LONG_SHARE = 0.12  # of the batches
HEARING_BATCH, HEARING_RATE = 64, 2e-3
READING_BATCH, READING_RATE = 48, 1.5e-3
CHUNK = 200  # clips at a time where no gradient is needed
LOUDNESS_JITTER = 0.1  # of the log-mel features, a small shift up or down


@dataclass
class Pool:
    """Clips of one window as the toy takes them: features or embeddings, the used length of each, the labels."""

    values: torch.Tensor
    lengths: torch.Tensor
    labels: list[dict[str, str]]


def feature_pool(toy: Toy, clips: list[LabelledSound], seconds: float) -> Pool:
    """The clips' mel features in a window of `seconds`."""
    chunks = [clips[start : start + CHUNK] for start in range(0, len(clips), CHUNK)]
    parts = [toy.features([clip.waveform for clip in chunk], seconds) for chunk in chunks]
    values, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pool(values.half(), lengths, [clip.labels for clip in clips])


@torch.no_grad()
def embedding_pool(toy: Toy, pool: Pool) -> Pool:
    """The clips' audio embeddings, from their features."""
    chunks = zip(pool.values.split(CHUNK), pool.lengths.split(CHUNK), strict=True)
    values, lengths = (torch.cat(part) for part in zip(*(toy.hear(v.float(), n) for v, n in chunks), strict=True))
    return Pool(values, lengths, pool.labels)


def pick_pool(pools: list[Pool], rng: random.Random) -> Pool:
    """The short pool mostly, the long one sometimes."""
    short, long = pools
    return long if rng.random() < LONG_SHARE else short


class Heads(nn.ModuleDict):
    """One linear classifier per track on the mean audio embedding of a clip."""

    def __init__(self, width: int) -> None:
        super().__init__({name: nn.Linear(width, len(track.labels)) for name, track in TRACKS.items()})

    def loss(self, means: torch.Tensor, labels: list[dict[str, str]]) -> torch.Tensor:
        """Cross entropy, summed over the tracks; a clip counts for the tracks it has a label of."""
        losses = [cross_entropy(head(means), label_indices(labels, name)) for name, head in self.items()]
        return torch.stack([loss for loss in losses if not loss.isnan()]).sum()

    @torch.no_grad()
    def accuracy(self, means: torch.Tensor, labels: list[dict[str, str]]) -> dict[str, float]:
        """The share of right answers by track."""
        right = {}
        for name, head in self.items():
            truth = label_indices(labels, name)
            right[name] = (head(means).argmax(-1) == truth)[truth >= 0].float().mean().item()
        return right


def label_indices(labels: list[dict[str, str]], name: str) -> torch.Tensor:
    """The position of each clip's label in its track, -100 (which cross entropy skips) where it has none."""
    known = TRACKS[name].labels
    return torch.tensor([known.index(clip[name]) if name in clip else -100 for clip in labels])


def mean_embeddings(embeddings: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean over each clip's own positions."""
    used = (torch.arange(embeddings.shape[1]) < counts[:, None]).float()[..., None]
    return (embeddings * used).sum(1) / used.sum(1)


def learn(parameters: Iterable[nn.Parameter], losses: Iterable[torch.Tensor], steps: int, rate: float) -> None:
    """Take one optimiser step per loss, with a learning rate that rises for a tenth of the steps and then falls."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}/{steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def learn_to_hear(toy: Toy, pools: list[Pool], held_out: Pool, steps: int, seed: int) -> None:
    """Stage 1. Prints what the heads get right of the held-out clips."""
    rng = random.Random(seed)
    hearing, heads = toy.hearing(), Heads(toy.hidden_size)

    def losses() -> Iterable[torch.Tensor]:
        while True:
            pool = pick_pool(pools, rng)
            rows = rng.sample(range(len(pool.labels)), HEARING_BATCH)
            features = pool.values[rows].float() + LOUDNESS_JITTER * torch.randn(HEARING_BATCH, 1, 1)
            means = mean_embeddings(*toy.hear(features, pool.lengths[rows]))
            yield heads.loss(means, [pool.labels[row] for row in rows])

    learn([*hearing.parameters(), *heads.parameters()], losses(), steps, HEARING_RATE)
    heard = embedding_pool(toy, held_out)
    print("  heads, held-out:", heads.accuracy(mean_embeddings(heard.values, heard.lengths), heard.labels), flush=True)


def learn_to_read(toy: Toy, pools: list[Pool], steps: int, seed: int) -> None:
    """Stage 2, on pools of embeddings."""
    rng = random.Random(seed)
    prompts = Prompts(toy)

    def losses() -> Iterable[torch.Tensor]:
        while True:
            pool = pick_pool(pools, rng)
            rows = rng.sample(range(len(pool.labels)), READING_BATCH)
            batch = prompts.batch([pool.labels[row] for row in rows], pool.lengths[rows].tolist(), rng)
            embeddings = toy.embed_tokens(batch.ids)
            heard = torch.cat([pool.values[row, : pool.lengths[row]] for row in rows])
            embeddings = embeddings.masked_scatter((batch.ids == prompts.audio_id)[..., None], heard)
            logits = toy.unembed(toy.read(embeddings, batch.attention_mask)[:, :-1][batch.weights[:, 1:] > 0])
            targets, weights = (part[:, 1:][batch.weights[:, 1:] > 0] for part in (batch.ids, batch.weights))
            yield (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()

    learn(toy.reading().parameters(), losses(), steps, READING_RATE)

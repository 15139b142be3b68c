"""Does this model, on this machine, do what every experiment here takes for granted? Each invariant is one small run.

The real checkpoints are seen by those who hold them, not by our tests; so the proof travels: ``audio-lens check MODEL``
or ``lalm.check()`` runs on the user's own model and clips what our tests run on the toys. Every invariant gives one
`Finding`: a figure, the most it may be, and whether it held. A recipe adds its own by a tuple named ``INVARIANTS``.

A difference is the root mean square of what two runs disagree by, in units of the standard deviation of what is right,
over positions that are no padding. What may remain is rounding: little in single precision, more where half precision
adds up the layers of a large model.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip, as_clip
from audio_lens_plugin.prompts import PromptBatch
from audio_lens_plugin.spans import Role

QUESTION, ANSWER = "What can be heard in the recording?", "In the recording there is"
NEW_TOKENS = 4
EXACT = 1e-6
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_ROUNDING = 0.1
HEARD = 1e-2  # least change of the logits that another sound must make, in standard deviations


@dataclass(frozen=True)
class Finding:
    """What one invariant found.

    Attributes:
        name: the invariant, in words.
        held: whether it held.
        measured: the figure, where there is one.
        limit: what the figure was held against ("at most ...", "at least ...").
        note: more to know: counts, or what went wrong.
    """

    name: str
    held: bool
    measured: float | None = None
    limit: str = ""
    note: str = ""


@dataclass(frozen=True, repr=False)
class CheckResult:
    """All findings about one model; ``passed`` if every invariant held."""

    model: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every invariant held."""
        return all(finding.held for finding in self.findings)

    def to_frame(self) -> pd.DataFrame:
        """One row per invariant."""
        return pd.DataFrame([asdict(finding) for finding in self.findings])

    def to_json(self) -> str:
        """The findings as JSON, for the record."""
        return json.dumps({"model": self.model, "passed": self.passed, "findings": list(map(asdict, self.findings))})

    def __repr__(self) -> str:
        lines = [f"{self.model}: {'all invariants hold' if self.passed else 'NOT SOUND'}"]
        for finding in self.findings:
            figure = "" if finding.measured is None else f"{finding.measured:.2e} ({finding.limit})"
            lines.append(
                f"  {'holds' if finding.held else 'FAILS':<6} {finding.name:<52} {figure} {finding.note}".rstrip()
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Probe:
    """A model and the clips to try it on; batches are made as the invariants need them.

    Attributes:
        lalm: the model, a `LALM`.
        clips: two clips, of different length where possible.
    """

    lalm: Any
    clips: tuple[Clip, Clip]

    def batch(self, *clips: Clip) -> PromptBatch:
        """One row per clip, all asked the same."""
        return self.lalm.prompt(list(clips), question=QUESTION, answer=ANSWER, truncate=True)

    def logits(self, batch: PromptBatch) -> torch.Tensor:
        """Logits of all positions, ``[batch, pos, d_vocab]``."""
        with torch.no_grad(), self.lalm.trace(batch):
            logits = self.lalm.unembed.output.save()
        return logits.float().cpu()

    def last(self, *clips: Clip) -> torch.Tensor:
        """Logits after the last position, ``[batch, d_vocab]``."""
        return self.logits(self.batch(*clips))[:, -1]

    def rounding(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Finding:
        """Whether two tensors are the same but for rounding in the model's dtype."""
        return at_most(name, found, wanted, ROUNDING.get(self.lalm.dtype, HALF_ROUNDING))


Invariant = Callable[[Probe], Finding]


def at_most(name: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> Finding:
    """Whether two tensors are at most ``limit`` apart (see `distance`)."""
    measured = distance(found, wanted)
    return Finding(name, measured <= limit, measured, f"at most {limit:g}")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square difference in standard deviations of ``wanted``; infinite where anything is not finite."""
    found, wanted = found.float().cpu(), wanted.float().cpu()
    measured = float((found - wanted).square().mean().sqrt() / wanted.std().clamp(min=1e-12))
    return measured if np.isfinite(measured) else float("inf")


def check(lalm: Any, clips: Sequence[Any] | None = None) -> CheckResult:
    """Run every invariant on a model.

    Args:
        lalm: the model, a `LALM`.
        clips: at least two recordings (anything `audio.as_clip` takes); two synthetic sounds if None.

    Raises:
        ValueError: fewer than two clips.
    """
    sounds = SYNTHETIC if clips is None else [as_clip(clip) for clip in clips]
    if len(sounds) < 2:
        raise ValueError(f"two different clips are needed to tell whether a model hears; there are {len(sounds)}.")
    probe = Probe(lalm, (sounds[0], sounds[1]))
    return CheckResult(repr(lalm), tuple(_tried(invariant, probe) for invariant in invariants()))


def invariants() -> list[Invariant]:
    """Those of this room, then those of the recipes."""
    recipes = importlib.import_module(
        f"{__package__}.recipes"
    )  # they stand above this room, and are only looked through
    rooms = [
        importlib.import_module(f"{recipes.__name__}.{info.name}") for info in pkgutil.iter_modules(recipes.__path__)
    ]
    return [*INVARIANTS, *(one for room in rooms for one in getattr(room, "INVARIANTS", ()))]


def _tried(invariant: Invariant, probe: Probe) -> Finding:
    """An invariant that cannot even run has failed; the others are still tried."""
    try:
        return invariant(probe)
    except Exception as error:
        return Finding(invariant.__name__.replace("_", " "), False, note=f"{type(error).__name__}: {error}")


def every_weight_is_there(probe: Probe) -> Finding:
    """No weight is missing (left on the meta device) or not finite. What a checkpoint lacks, loading refuses."""
    weights = dict(probe.lalm.module.named_parameters())
    offloaded = bool(getattr(probe.lalm.module, "hf_device_map", None))
    broken = [
        name
        for name, weight in weights.items()
        if (weight.is_meta and not offloaded) or not (weight.is_meta or bool(torch.isfinite(weight).all()))
    ]
    count = sum(weight.numel() for weight in weights.values())
    note = f"{count:,} parameters" if not broken else f"not there or not finite: {', '.join(broken[:5])}"
    return Finding("every weight is there and finite", not broken, note=note)


def positions_cover_the_sequence(probe: Probe) -> Finding:
    """Every position has a role, only padding is masked, and audio is written where the map says audio."""
    batch = probe.batch(*probe.clips)
    roles, mask = batch.positions.roles, batch.inputs["attention_mask"]
    audio = roles == Role.AUDIO
    with torch.no_grad(), probe.lalm.trace(batch) as tracer:
        looked_up = probe.lalm.embed.output.save()
        entering = probe.lalm.blocks[0].input.save()
        tracer.stop()
    written = (looked_up != entering).any(-1).cpu()
    held = bool(((roles == Role.PAD) == (mask == 0)).all()) and bool(written[audio].all())
    held &= bool((roles[written & ~audio] == Role.TEMPLATE).all())
    return Finding(
        "positions cover the sequence, audio where it is said", held, note=f"{int(audio.sum())} audio positions"
    )


def logits_are_finite(probe: Probe) -> Finding:
    """No NaN and no infinity at any real position."""
    batch = probe.batch(*probe.clips)
    logits = probe.logits(batch)[batch.inputs["attention_mask"].bool()]
    return Finding(
        "logits are finite", bool(torch.isfinite(logits).all()), note=f"standard deviation {logits.std():.2f}"
    )


def two_clips_differ(probe: Probe) -> Finding:
    """Another clip of the same length gives other logits: more positions alone would, too."""
    shorter = min(clip.seconds for clip in probe.clips)
    first, second = (replace(clip, waveform=clip.waveform[: int(shorter * clip.rate)]) for clip in probe.clips)
    return _heard("another clip changes the logits", probe, first, second)


def silence_differs(probe: Probe) -> Finding:
    """Silence gives other logits."""
    return _heard("silence changes the logits", probe, probe.clips[0], probe.clips[0].silenced())


def a_row_equals_its_single_run(probe: Probe) -> Finding:
    """Padding and neighbours do not matter."""
    alone = torch.cat([probe.last(clip) for clip in probe.clips])
    return probe.rounding("a row of a batch equals its single run", probe.last(*probe.clips), alone)


def a_self_patch_changes_nothing(probe: Probe) -> Finding:
    """Every block's output, put back where it was read."""
    batch = probe.batch(*probe.clips)
    with torch.no_grad(), probe.lalm.trace(batch):
        ops.write_back(probe.lalm.blocks)
        logits = probe.lalm.unembed.output.save()
    return at_most("a self-patch of every block changes nothing", logits[:, -1], probe.logits(batch)[:, -1], EXACT)


def an_empty_knockout_changes_nothing(probe: Probe) -> Finding:
    """Every attention mask, put back as it was."""
    batch = probe.batch(*probe.clips)
    with torch.no_grad(), probe.lalm.trace(batch):
        ops.write_masks_back(probe.lalm.blocks)
        logits = probe.lalm.unembed.output.save()
    return at_most("an empty knockout changes nothing", logits[:, -1], probe.logits(batch)[:, -1], EXACT)


def cached_generation_equals_a_recompute(probe: Probe) -> Finding:
    """Logits of each generated step with the key-value cache, against one full pass over the result."""
    batch = probe.batch(*probe.clips)
    made = probe.lalm.generate(
        batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = probe.lalm.inputs(batch)
    extra = made.sequences.shape[1] - batch.shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)
    with torch.no_grad():
        whole = probe.lalm.module(**{**inputs, "input_ids": made.sequences, "attention_mask": mask}).logits
    steps = whole[:, batch.shape[1] - 1 : -1]
    return probe.rounding("cached generation equals a full recompute", torch.stack(made.logits, dim=1), steps)


def sites_agree_with_transformer_lens(probe: Probe) -> Finding:
    """The same activations through nnsight and through the bridge, at a layer in the middle and in the tower."""
    lalm, batch = probe.lalm, probe.batch(*probe.clips)
    layer, ear = lalm.n_layers // 2, len(lalm.audio_encoder.blocks) // 2
    names = {f"blocks.{layer}.{site}": read for site, read in ops.SITES.items()}
    heard = f"audio_encoder.blocks.{ear}.hook_resid_post"
    with torch.no_grad():
        _, cache = lalm.bridge().run_with_cache(batch, names_filter=[*names, heard])
    real = batch.inputs["attention_mask"].bool()
    apart = {heard: distance(_read(probe, batch, lambda: lalm.audio_encoder.blocks[ear].output), cache[heard])}
    for name, read in names.items():
        value = _read(probe, batch, partial(read, lalm.blocks[layer], lalm.d_head))
        apart[name] = distance(value.cpu()[real], cache[name].cpu()[real])
    worst = max(apart, key=lambda name: apart[name])
    limit = ROUNDING.get(lalm.dtype, HALF_ROUNDING)
    return Finding(
        "sites equal through nnsight and TransformerLens",
        apart[worst] <= limit,
        apart[worst],
        f"at most {limit:g}",
        worst,
    )


def _read(probe: Probe, batch: PromptBatch, site: Callable[[], Any]) -> torch.Tensor:
    with torch.no_grad(), probe.lalm.trace(batch) as tracer:
        value = site().save()
        tracer.stop()
    return value[0] if isinstance(value, tuple) else value


def _heard(name: str, probe: Probe, clip: Clip, other: Clip) -> Finding:
    measured = distance(probe.last(other), probe.last(clip))
    return Finding(name, HEARD <= measured < float("inf"), measured, f"at least {HEARD:g}")


def _sound(name: str, seconds: float, hertz: float) -> Clip:
    """A tone that swells, in a little noise."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(0).normal(scale=0.01, size=len(time))
    wave = 0.3 * np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / seconds)
    return Clip((wave + noise).astype(np.float32), 16_000, name)


SYNTHETIC = (_sound("a low tone", 1.5, 200), _sound("a high tone", 0.8, 2_000))

INVARIANTS: tuple[Invariant, ...] = (
    every_weight_is_there,
    positions_cover_the_sequence,
    logits_are_finite,
    two_clips_differ,
    silence_differs,
    a_row_equals_its_single_run,
    a_self_patch_changes_nothing,
    an_empty_knockout_changes_nothing,
    cached_generation_equals_a_recompute,
    sites_agree_with_transformer_lens,
)

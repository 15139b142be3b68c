"""What do causal sweeps cost? Patching and knockout by the engine, by a forward pass per cell, by TransformerLens.

    python benchmarks/sweeps.py [--toy] [--device cuda] [--threads 2] [--json FILE]

Two prompts differ in their clip of 5 s. A cell takes the clean residual stream before one block into the corrupted run,
at the positions of one role: all layers x `ROLES`.

1. hooks            one full forward pass per cell; a plain torch hook puts the clean states in.
2. TransformerLens  `patching.generic_activation_patch`, through the bridge that passes the audio.
3. engine           `activation_patching`: all cells, both stored runs and the tables included.
4. plain            transformers' own forward pass of the corrupted prompt: the unit of the counted work.
5. blocks           the language model alone on finished embeddings, without tower and head: the strict unit.

The knockout sweep cuts the last position off from the audio in `WINDOW` layers around each layer: by hooks that put
another attention mask in, and by the engine. Rounds alternate between all arms, and each round runs its share of the
cells that stand for all in the slow arms, so that a busy machine slows all alike; a ratio is the median of the rounds'
ratios. Hooks, plain and blocks run on a twin of the module that shares its weights and that nnsight never touched.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from lens import peak, timed
from nnsight import save
from transformer_lens import patching
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor
from transformers.initialization import no_init_weights

from audio_lens_plugin import LALM, activation_patching, attention_knockout, load, pairs_from
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.prompts import Prompt, Sample

ROLES = ("template", "audio", "question", "attribute", "answer", "last")
WORDS = ("dog", "cat", "pig", "cow")
ASKED = dict(question="What animal makes the sound?", answer="The sound file's animal is", attribute="animal")
SECONDS, RATE, WINDOW, READS = 5.0, 16_000, 3, 24
ROWS = 8  # cells that the engine runs at once
TOLERANCE = 1e-4
LEAST_SPEEDUP, LEAST_KNOCKOUT, MOST_OF_COUNTED, MOST_OF_PEAK = 8.0, 15.0, 1.25, 1.5

Cell = tuple[int, str]  # layer, role


@dataclass(frozen=True)
class Size:
    """How one model is measured.

    Attributes:
        build: makes the model on a device.
        every: the slow arms run the cells of every so many layers.
        rounds: rounds of the race; the slow arms' cells are shared out among them.
        reads: rounds in which a trace and plain hooks take turns.
        weighed: whether memory is measured; a toy's is lost in what the process holds anyway.
    """

    build: Callable[[str], LALM]
    every: int
    rounds: int
    reads: int
    weighed: bool


def toy(device: str) -> LALM:
    """The toy as it ships."""
    shipped = load("toy/qwen2-audio")
    return load(shipped.module.to(device), shipped.processor)


def half(device: str) -> LALM:
    """A random Qwen2-Audio of half the published width and depth, with the published window and the toy's words."""
    processor = copy.copy(load("toy/qwen2-audio").processor)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    tower = dict(model_type="qwen2_audio_encoder", d_model=640, encoder_layers=16, encoder_attention_heads=10)
    tower |= dict(encoder_ffn_dim=2560, num_mel_bins=128, max_source_positions=1500)
    text = dict(model_type="qwen2", hidden_size=2048, intermediate_size=5504, num_hidden_layers=16)
    text |= dict(num_attention_heads=16, num_key_value_heads=16, vocab_size=150_000, tie_word_embeddings=False)
    text |= dict(pad_token_id=processor.tokenizer.pad_token_id)
    config = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=processor.audio_token_id)
    with no_init_weights():  # its normal distributions would take minutes
        module = Qwen2AudioForConditionalGeneration(config)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        fill(name, parameter.data)
    return load(module.eval().to(device), processor)


def fill(name: str, weight: torch.Tensor) -> None:
    """Matrices uniform with the usual deviation of 0.02, norms 1, biases 0."""
    if weight.ndim > 1:
        bound = 0.02 * math.sqrt(3)
        weight.uniform_(-bound, bound)
    else:
        weight.fill_(float(name.endswith("norm.weight")))


SIZES = {
    "toy": Size(toy, every=1, rounds=4, reads=25, weighed=False),
    "half": Size(half, every=4, rounds=3, reads=5, weighed=True),
}


def counted(cells: Sequence[Cell], first: Mapping[str, int], layers: int, length: int) -> int:
    """Layer x position products that must run: from a cell's layer on, and from its role's first position on."""
    return sum((layers - layer) * (length - first[role]) for layer, role in cells)


def sampled(cells: Sequence[Cell], every: int) -> list[Cell]:
    """The cells of every so many layers, from the first on."""
    return [cell for cell in cells if cell[0] % every == 0]


def window(centre: int, layers: int) -> range:
    """The layers around one, as many as there are at the edges."""
    return range(max(centre - WINDOW // 2, 0), min(centre + WINDOW // 2 + 1, layers))


def ratios(seconds: Mapping[str, float], passes: float) -> dict[str, float]:
    """What one round's seconds say.

    Args:
        seconds: of each arm, for the whole sweep.
        passes: the counted work of the cells in forward passes (layers x positions).
    """
    engine = seconds["engine"]
    return {
        "hooks / engine": seconds["hooks"] / engine,
        "TransformerLens / engine": seconds["TransformerLens"] / engine,
        "engine / counted": engine / (passes * seconds["plain"]),
        # Strictly: what a pass takes without tower and head; but then the two stored runs must be counted, too.
        "engine / strictly": engine / ((passes + 2) * seconds["blocks"]),
        "knockout hooks / engine": seconds["knockout hooks"] / seconds["knockout engine"],
    }


def largest_difference(values: Mapping[Any, torch.Tensor], others: Mapping[Any, torch.Tensor]) -> float:
    """Over the cells of ``values``; a NaN on either side counts as infinite."""
    gaps = [torch.nan_to_num(value - others[cell], nan=torch.inf).abs().max() for cell, value in values.items()]
    return float(max(gaps))


def read(blocks: Any, layers: Sequence[int]) -> list[torch.Tensor]:
    """Inside a trace: three saves per layer, in forward order."""
    states = []
    for layer in layers:
        states.append(save(blocks[layer].attn.output[0]))
        states.append(save(blocks[layer].mlp.output))
        states.append(save(blocks[layer].output))
    return states


class Sweep:
    """The prompts, the cells, and the arms. All give fp32 logits of `WORDS` at the last position, on the CPU.

    Attributes:
        samples: the clean and the corrupted prompt.
        cells: all (layer, role), layers outermost.
        first: the first position of each role.
        passes: the counted work of all cells, in forward passes.
    """

    @torch.no_grad()
    def __init__(self, lalm: LALM) -> None:
        self.lalm, self.twin, self.bridge = lalm, weight_sharing_twin(lalm.module), lalm.bridge()
        tone, noise = clips()
        self.samples = [
            Sample(clip.name, Prompt((clip,), **ASKED), word) for clip, word in ((tone, "dog"), (noise, "cat"))
        ]
        self.clean, self.corrupted = (lalm.batch([sample.prompt]) for sample in self.samples)
        self.inputs, self.ids = lalm.inputs(self.corrupted), lalm.labels(WORDS).first
        self.layers, self.length = lalm.n_layers, self.corrupted.shape[1]
        self.cols = {role: self.corrupted.at(role).cols for role in ROLES}
        self.first = {role: int(cols.min()) for role, cols in self.cols.items()}
        self.cells = list(product(range(self.layers), ROLES))
        work = counted(self.cells, self.first, self.layers, self.length)
        self.passes = work / (self.layers * self.length)
        self.blocks_of_twin = self.twin.model.language_model.layers
        self.clean_states = self.states(lalm.inputs(self.clean))
        self.embeddings = self.states(self.inputs)[0]
        _, self.clean_cache = self.bridge.run_with_cache(
            self.clean, names_filter=lambda name: name.endswith("hook_resid_pre") and name.startswith("blocks")
        )

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The residual stream before every block, by plain hooks."""
        states: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for block in self.blocks_of_twin:
                hooks.enter_context(block.register_forward_pre_hook(lambda _, args: states.append(args[0].clone())))
            self.twin(**inputs, use_cache=False)
        return states

    @torch.no_grad()
    def plain(self) -> torch.Tensor:
        """Transformers' own forward pass. Qwen2-Audio's unembeds every position."""
        return self.twin(**self.inputs, use_cache=False).logits[0, -1, self.ids].float().cpu()

    @torch.no_grad()
    def blocks(self) -> torch.Tensor:
        """The language model alone, from its embeddings to the final norm."""
        model, mask = self.twin.model.language_model, self.inputs["attention_mask"]
        return model(inputs_embeds=self.embeddings, attention_mask=mask, use_cache=False).last_hidden_state.cpu()

    @torch.no_grad()
    def crowd(self) -> None:
        """The plain forward pass of as many rows as the engine runs at once."""
        self.twin(**{name: value.repeat_interleave(ROWS, 0) for name, value in self.inputs.items()}, use_cache=False)

    def hooked(self, cell: Cell) -> torch.Tensor:
        """One cell: a full forward pass with a hook."""
        layer, role = cell

        def patch(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            state = args[0].clone()
            state[:, self.cols[role]] = self.clean_states[layer][:, self.cols[role]]
            return (state, *args[1:])

        with self.blocks_of_twin[layer].register_forward_pre_hook(patch):
            return self.plain()

    @torch.no_grad()
    def through_lens(self, cells: Sequence[Cell]) -> dict[Cell, torch.Tensor]:
        """Cells by TransformerLens: its own loop, and one metric per word."""
        index = pd.DataFrame([(layer, ROLES.index(role)) for layer, role in cells], columns=["layer", "role"])
        metrics = {str(word): lambda logits, word=word: logits[0, -1, word].float() for word in self.ids.tolist()}

        def patch(state: torch.Tensor, cell: Sequence[int], clean: torch.Tensor) -> torch.Tensor:
            cols = self.cols[ROLES[cell[1]]]
            state[:, cols] = clean[:, cols]
            return state

        with redirect_stderr(StringIO()):  # its progress bar
            result = patching.generic_activation_patch(
                self.bridge, self.corrupted, self.clean_cache, metrics, patch, "resid_pre", index_df=index
            )
        return dict(zip(cells, result.values.T.cpu(), strict=True))  # noqa: PD011 (no pandas)

    def knocked_out(self, centre: int) -> torch.Tensor:
        """One window: a full forward pass in which the last position does not read the audio."""
        seen = torch.ones(1, 1, self.length, self.length, dtype=torch.bool, device=self.embeddings.device).tril()
        seen[..., -1, self.cols["audio"]] = False

        def block(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "attention_mask": seen}  # no padding: being causal is all that the mask said

        with ExitStack() as hooks:
            for layer in window(centre, self.layers):
                attention = self.blocks_of_twin[layer].self_attn
                hooks.enter_context(attention.register_forward_pre_hook(block, with_kwargs=True))
            return self.plain()

    @property
    def layers_read(self) -> range:
        """Layers of the `READS` reads that a trace and plain hooks are compared on."""
        return range(0, self.layers, self.layers * 3 // READS)

    def traced_reads(self) -> list[torch.Tensor]:
        """`READS` activations in one traced pass."""
        with torch.no_grad(), self.lalm.trace(self.corrupted, use_cache=False):
            states = save(read(self.lalm.blocks, self.layers_read))
        return [state.cpu() for state in states]

    @torch.no_grad()
    def hooked_reads(self) -> list[torch.Tensor]:
        """The same by plain hooks."""
        states: list[torch.Tensor] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for layer in self.layers_read:
                block = self.blocks_of_twin[layer]
                for module in (block.self_attn, block.mlp, block):
                    hooks.enter_context(module.register_forward_hook(keep))
            self.twin(**self.lalm.inputs(self.corrupted), use_cache=False)
        return [state.cpu() for state in states]


def clips() -> tuple[Clip, Clip]:
    """A wavering tone and a noise of the same length."""
    time = np.arange(int(SECONDS * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * time + 20 * np.sin(2 * np.pi * 3 * time))
    noise = np.random.default_rng(0).normal(0, 0.1, len(time))
    return tuple(Clip(wave.astype(np.float32), RATE, name) for wave, name in ((tone, "tone"), (noise, "noise")))


def engine_patching(sweep: Sweep) -> dict[Cell, torch.Tensor]:
    """All cells by the engine, encoding and both stored runs included."""
    pairs = pairs_from(sweep.samples, corrupted="other", limit=1)  # the first sample is the clean one
    result = activation_patching(
        sweep.lalm, pairs, WORDS, sites=("hook_resid_pre",), positions=ROLES, batch_size=ROWS, progress=False
    )
    keys = zip(result.cells["layer"].tolist(), result.cells["position"], strict=True)
    return dict(zip(keys, result.scores.label_logits, strict=True))


def engine_knockout(sweep: Sweep) -> dict[int, torch.Tensor]:
    """All windows by the engine, of the corrupted prompt, by window centre; encoding and the stored run included."""
    samples = sweep.samples[1:]
    result = attention_knockout(
        sweep.lalm, samples, WORDS, "last", "audio", window=WINDOW, control=False, batch_size=ROWS
    )
    return dict(zip(result.cells["layer"].tolist(), result.scores.label_logits, strict=True))


def one_round(sweep: Sweep, cells: Sequence[Cell], centres: Sequence[int]) -> dict[str, Any]:
    """Every arm once, the slow ones on the given cells and windows only: seconds of whole sweeps, and differences."""
    plain, start = timed(sweep.plain)
    blocks, _ = timed(sweep.blocks)
    engine, patched = timed(lambda: engine_patching(sweep))
    hooks, of_hooks = timed(lambda: {cell: sweep.hooked(cell) for cell in cells})
    lens, of_lens = timed(lambda: sweep.through_lens(cells))
    engine_knocked, knocked = timed(lambda: engine_knockout(sweep))
    hooks_knocked, of_knocked = timed(lambda: {centre: sweep.knocked_out(centre) for centre in centres})
    # Besides its cells a sweep has a clean and a corrupted run, or the one to be knocked out, as the engine's time has.
    runs, windows = (len(sweep.cells) + 2) / len(cells), (sweep.layers + 1) / len(centres)
    return {
        "seconds": {
            **{"plain": plain, "blocks": blocks, "engine": engine, "hooks": hooks * runs},
            **{"TransformerLens": lens * runs, "knockout engine": engine_knocked},
            "knockout hooks": hooks_knocked * windows,
        },
        "off": {
            "hooks": largest_difference(of_hooks, patched),
            "TransformerLens": largest_difference(of_lens, patched),
            "knockout hooks": largest_difference(of_knocked, knocked),
        },
        "effects": {
            "patching": max(float((value - start).abs().max()) for value in of_hooks.values()),
            "knockout": max(float((value - start).abs().max()) for value in of_knocked.values()),
        },
    }


def race(sweep: Sweep, size: Size) -> dict[str, Any]:
    """Times and ratios of the rounds, and how far the values lie apart at most."""
    cells, centres = sampled(sweep.cells, size.every), range(0, sweep.layers, size.every)
    _ = sweep.plain(), sweep.hooked(cells[0]), sweep.through_lens(cells[:1]), engine_knockout(sweep)  # warm-up
    rounds = [one_round(sweep, cells[n :: size.rounds], centres[n :: size.rounds]) for n in range(size.rounds)]
    compared = [ratios(one["seconds"], sweep.passes) for one in rounds]
    return {
        "seconds": {name: median(one["seconds"][name] for one in rounds) for name in rounds[0]["seconds"]},
        "ratios": {name: [one[name] for one in compared] for name in compared[0]},
        "off": {name: max(one["off"][name] for one in rounds) for name in rounds[0]["off"]},
        "effects": {name: max(one["effects"][name] for one in rounds) for name in rounds[0]["effects"]},
        "ran": {"cells": len(cells), "windows": len(centres)},
    }


def tracing(sweep: Sweep, rounds: int) -> dict[str, float]:
    """A traced pass beside one with plain hooks, the same `READS` reads: median ratio, milliseconds, difference."""
    hooked, traced = sweep.hooked_reads(), sweep.traced_reads()  # warm-up
    off = largest_difference(dict(enumerate(hooked)), dict(enumerate(traced)))
    pairs = [(timed(sweep.traced_reads)[0], timed(sweep.hooked_reads)[0]) for _ in range(rounds)]
    return {
        "ratio": median(traced / hooked for traced, hooked in pairs),
        "ms": median(1000 * (traced - hooked) for traced, hooked in pairs),
        "off": off,
    }


def memory(sweep: Sweep, device: str) -> dict[str, float]:
    """Peaks in MiB: at rest, of a plain forward pass of as many rows as the engine runs at once, and of the engine.

    The pass comes first: what it leaves with the allocator counts against the engine, not for it.
    """
    _ = sweep.plain(), engine_knockout(sweep)
    rest = peak(lambda: None, device)
    return dict(rest=rest, plain=peak(sweep.crowd, device), engine=peak(lambda: engine_patching(sweep), device))


def measure(size: Size, device: str) -> dict[str, Any]:
    """All figures of one size, printed as they come."""
    sweep = Sweep(size.build(device))
    introduce(sweep)
    figures = dict(memory=memory(sweep, device) if size.weighed else None, **race(sweep, size))
    figures |= dict(cells=len(sweep.cells), windows=sweep.layers, passes=sweep.passes)
    figures |= dict(tracing=tracing(sweep, size.reads))
    report(figures)
    return figures


def introduce(sweep: Sweep) -> None:
    """Print the model and the counted work."""
    text, tower = sweep.lalm.module.config.get_text_config(), sweep.lalm.module.config.audio_config
    print(f"\n{sweep.lalm}")
    print(f"text: d {text.hidden_size}, MLP {text.intermediate_size}, vocabulary {text.vocab_size};", end=" ")
    print(f"tower: d {tower.d_model}, {tower.encoder_layers} layers, {tower.max_source_positions} frames")
    print(f"{len(sweep.cells)} cells of {sweep.length} positions, roles from {sweep.first} on")
    print(f"counted work     {sweep.passes:.1f} forward passes ({sweep.passes / len(sweep.cells):.1%} of one per cell)")


def verdicts(figures: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each target, and whether it is reached. Memory is counted beyond what rests, which the weights would flatter."""
    found = {name: median(values) for name, values in figures["ratios"].items()}
    told = [
        (f"engine at least {LEAST_SPEEDUP:g} x faster than {arm}", found[f"{arm} / engine"] >= LEAST_SPEEDUP)
        for arm in ("hooks", "TransformerLens")
    ]
    told.append(
        (f"engine at most {MOST_OF_COUNTED:g} x the counted work", found["engine / counted"] <= MOST_OF_COUNTED)
    )
    reached = found["knockout hooks / engine"] >= LEAST_KNOCKOUT
    told.append((f"knockout at least {LEAST_KNOCKOUT:g} x faster than hooks", reached))
    if space := figures["memory"]:
        extra = (space["engine"] - space["rest"]) / (space["plain"] - space["rest"])
        told.append((f"peak at most {MOST_OF_PEAK:g} x one plain forward pass's", extra <= MOST_OF_PEAK))
    return told


def report(figures: dict[str, Any]) -> None:
    """Print the figures, and for each target whether it is reached."""
    ran, off, trace = figures["ran"], figures["off"], figures["tracing"]
    print(f"slow arms        ran {ran['cells']} of {figures['cells']} cells and {ran['windows']} of", end=" ")
    print(f"{figures['windows']} windows; their seconds are extrapolated to all")
    print("median seconds  ", ", ".join(f"{name} {value:.3g}" for name, value in figures["seconds"].items()))
    for name, values in figures["ratios"].items():
        print(f"{name:<24} {median(values):6.2f}   (rounds: {min(values):.2f} to {max(values):.2f})")
    print("difference       of the engine to", ", ".join(f"{name} {value:.1e}" for name, value in off.items()), end=" ")
    effects = ", ".join(f"{name} {value:.1e}" for name, value in figures["effects"].items())
    print(f"(the cells change the logits by up to: {effects})")
    if space := figures["memory"]:
        print("peak MiB        ", ", ".join(f"{name} {value:.0f}" for name, value in space.items()), end=" ")
        print(f"({ROWS} rows; engine / plain {space['engine'] / space['plain']:.2f},", end=" ")
        print(f"beyond rest {(space['engine'] - space['rest']) / (space['plain'] - space['rest']):.2f})")
    print(f"a traced pass    {trace['ratio']:.3f} x plain hooks, {trace['ms']:+.1f} ms, {READS} reads", end=" ")
    print(f"({trace['off']:.1e} apart)")
    for target, reached in verdicts(figures):
        print(f"target {'reached' if reached else 'MISSED'}: {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of causal sweeps.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is steadiest beside other work")
    parser.add_argument("--toy", action="store_true", help="the toy alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{options.threads} thread(s) on {os.cpu_count()} CPUs"
    print(f"{where}, load average {os.getloadavg()[0]:.1f}")
    names = ["toy"] if options.toy else list(SIZES)
    figures = {name: measure(SIZES[name], options.device) for name in names}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if not all(gap <= TOLERANCE for one in figures.values() for gap in (*one["off"].values(), one["tracing"]["off"])):
        sys.exit(f"the values disagree by more than {TOLERANCE:g}.")


if __name__ == "__main__":
    main()

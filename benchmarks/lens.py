"""What does the logit lens cost? Time against a plain forward pass and against reading layer by layer; peak memory.

    python benchmarks/lens.py [--device cuda] [--threads 2] [--json FILE]

1. lens      `logit_lens(lalm, batch, labels)`: all layers at each row's last position, in one pass, tables included.
2. plain     transformers' own forward pass of the same batch. Qwen2-Audio's unembeds every position.
3. lean      the same without the head, which then meets the last positions alone: the least that an answer costs.
4. replaced  the layer-by-layer procedure of the AudioLens paper's code: for every layer a whole forward pass, in which
             that layer's state at the last positions takes the place of the last layer's output.

Rounds alternate between the four, and each round runs its share of the L replaced passes, so that a busy machine slows
all alike; a ratio is the median of the rounds' ratios. Passes 2 to 4 run on a twin of the module that shares its
weights and that nnsight never touched. Memory is the peak of a lens over all audio positions, less a forward pass's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from audio_lens_plugin import LALM, LensResult, load, logit_lens
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.labels import Labels
from audio_lens_plugin.loading import SHELF

LAYERS, D_MODEL, D_MLP, HEADS, KV_HEADS, VOCABULARY = 32, 512, 2688, 8, 2, 150_000
ROWS, SECONDS_TIMED, SECONDS_MEASURED = 4, 2.5, 5.0  # 5 s: 4 x 125 audio positions, the 500 of the memory target
ROUNDS, TOLERANCE, MIB = 4, 1e-4, 2**20
MOST_OF_PLAIN, LEAST_SPEEDUP, MOST_OF_CUBE = 1.15, 25.0, 0.05


def build(device: str) -> tuple[LALM, Any]:
    """A random Qwen2-Audio with the toy's tower and processor, and its untouched twin."""
    toy = SHELF / "qwen2-audio"
    processor = AutoProcessor.from_pretrained(toy)
    text = dict(model_type="qwen2", num_hidden_layers=LAYERS, hidden_size=D_MODEL, intermediate_size=D_MLP)
    text |= dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY)
    text |= dict(tie_word_embeddings=False, pad_token_id=processor.tokenizer.pad_token_id)
    tower = Qwen2AudioConfig.from_pretrained(toy).audio_config.to_dict()
    config = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=processor.audio_token_id)
    torch.manual_seed(0)
    module = Qwen2AudioForConditionalGeneration(config).eval().to(device)
    twin = weight_sharing_twin(module)
    return load(module, processor), twin


class Passes:
    """What is measured, on a batch of noise. Forward passes give fp32 logits at the last positions, ``[rows, words]``.

    Attributes:
        batch: `ROWS` rows of one clip each.
        labels: arbitrary words of the vocabulary.
    """

    def __init__(self, lalm: LALM, twin: Any, seconds: float) -> None:
        self.lalm, self.twin = lalm, twin
        rate = lalm.processor.feature_extractor.sampling_rate
        noise = np.random.default_rng(0).normal(0, 0.1, (ROWS, int(seconds * rate))).astype(np.float32)
        asked = dict(question="What animal is it?", answer="The sound file's animal is")
        self.batch = lalm.prompt(list(noise), **asked, rate=rate)
        ids = range(VOCABULARY // 5, VOCABULARY, VOCABULARY // 5)
        words = tuple(f"word {index}" for index in ids)
        self.labels = Labels(words, "spaced", tuple((index,) for index in ids), tuple((word,) for word in words))
        self.inputs, last = lalm.inputs(self.batch), self.batch.at("last")
        self.last = (last.rows, last.cols)

    def lens(self, position: str = "last") -> LensResult:
        """The package's lens."""
        return logit_lens(self.lalm, self.batch, self.labels, (position,))

    @torch.no_grad()
    def plain(self) -> torch.Tensor:
        """One forward pass."""
        return self.twin(**self.inputs, use_cache=False).logits[self.last].float().cpu()

    @torch.no_grad()
    def lean(self) -> torch.Tensor:
        """One forward pass that unembeds the last positions alone."""
        states = self.twin.model(**self.inputs, use_cache=False).last_hidden_state
        return self.twin.lm_head(states[self.last]).float().cpu()

    def replaced(self, layer: int) -> torch.Tensor:
        """One forward pass whose last block hands on the state after block ``layer`` (from 0)."""
        states: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            states.append(output[self.last])

        def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            output[self.last] = states[0]

        blocks = self.twin.model.language_model.layers
        with blocks[layer].register_forward_hook(keep), blocks[-1].register_forward_hook(replace):
            return self.plain()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out: on the CPU, so that a GPU has finished."""
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def peak(run: Callable[[], Any], device: str) -> float:
    """Peak memory while ``run`` runs, in MiB: the allocator's on CUDA, else the process's resident set (Linux)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    run()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def memory(passes: Passes, device: str) -> dict[str, float]:
    """Peaks in MiB of the forward passes and of a lens over all audio positions; its extra as a share of the cube."""
    passes.plain()
    probe = peak(lambda: torch.ones(256 * MIB // 4, device=device), device) - peak(lambda: None, device)
    lean, plain = peak(passes.lean, device), peak(passes.plain, device)
    lens = peak(lambda: passes.lens("audio"), device)
    positions = len(passes.batch.at("audio")) + len(passes.batch.at("last"))
    cube = (LAYERS + 1) * positions * VOCABULARY * 4 / MIB
    shares = {"over plain": (lens - plain) / cube, "over lean": (lens - lean) / cube}
    return dict(probe=probe, lean=lean, plain=plain, lens=lens, positions=positions, cube=cube, **shares)


def race(passes: Passes) -> dict[str, Any]:
    """Times and ratios of the rounds, and how far the values lie apart."""
    _ = passes.plain(), passes.lens(), passes.lean()  # warm-up
    rounds, replaced = [], []
    for number in range(ROUNDS):
        plain, logits = timed(passes.plain)
        lens, result = timed(passes.lens)
        lean, _ = timed(passes.lean)
        share = range(number * LAYERS // ROUNDS, (number + 1) * LAYERS // ROUNDS)
        runs = [timed(partial(passes.replaced, layer)) for layer in share]
        replaced += [out for _, out in runs]
        all_layers = sum(run[0] for run in runs) * LAYERS / len(runs)
        rounds.append(dict(plain=plain, lens=lens, lean=lean, replaced=all_layers))
    ids = passes.labels.first
    of_lens = torch.cat([result.label_logits, result.log_partition[..., None]], -1)[1:]
    of_passes = torch.stack([torch.cat([out[:, ids], out.logsumexp(-1, True)], -1) for out in replaced])
    return {
        "seconds": {name: median(one[name] for one in rounds) for name in rounds[0]},
        "lens / plain": [one["lens"] / one["plain"] for one in rounds],
        "lens / lean": [one["lens"] / one["lean"] for one in rounds],
        "replaced / lens": [one["replaced"] / one["lens"] for one in rounds],
        "off model": float((of_lens[-1, :, :-1] - logits[:, ids]).abs().max()),
        "off replaced": float((of_lens - of_passes).abs().max()),
        "smallest step": float(of_passes.diff(dim=0).abs().amax((1, 2)).min()),
    }


def introduce(passes: Passes, device: str, threads: int) -> None:
    """Print what is measured where and how, and what about it is not as in a real model."""
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{threads} thread(s) on {os.cpu_count()} CPUs"
    how = "torch.cuda.max_memory_allocated" if cuda else "VmHWM of this process, reset by clear_refs before each pass"
    rows, length = passes.batch.inputs["input_ids"].shape
    block = sum(weight.numel() for weight in passes.twin.model.language_model.layers[0].parameters())
    print(f"{where}, load average {os.getloadavg()[0]:.1f}; {passes.lalm}")
    print(f"random weights, d {D_MODEL}, MLP {D_MLP}, vocabulary {VOCABULARY}; batch of {rows} x {length} positions")
    print(f"unlike the 7B model: the head is as large as {D_MODEL * VOCABULARY / block:.0f} blocks, not 2.3,")
    print("which flatters the lens beside plain, not beside lean; a tiny tower, which burdens it beside both")
    print(f"peak memory: {how}")


def report(times: dict[str, Any], space: dict[str, float]) -> None:
    """Print the figures, and for each target whether it is reached."""
    print("\nmedian seconds: ", ", ".join(f"{name} {value:.2f}" for name, value in times["seconds"].items()))
    for name in ("lens / plain", "lens / lean", "replaced / lens"):
        print(f"{name:<16} {median(times[name]):6.2f}   (rounds: {min(times[name]):.2f} to {max(times[name]):.2f})")
    print(f"difference       to the model {times['off model']:.1e}, to the replaced passes {times['off replaced']:.1e}")
    print(f"                 (from layer to layer the values change by {times['smallest step']:.1e} or more)")
    print("peak MiB        ", ", ".join(f"{name} {space[name]:.0f}" for name in ("lean", "plain", "lens")), end=" ")
    print(f"(a tensor of 256 reads as {space['probe']:.0f})")
    print(f"full cube        {LAYERS + 1} x {space['positions']} x {VOCABULARY} x 4 bytes = {space['cube']:.0f} MiB")
    print(f"extra peak       {space['over plain']:.1%} of the cube over plain, {space['over lean']:.1%} over lean")
    for target, reached in (
        (f"lens at most {MOST_OF_PLAIN} x plain", median(times["lens / plain"]) <= MOST_OF_PLAIN),
        (f"replaced at least {LEAST_SPEEDUP:.0f} x lens", median(times["replaced / lens"]) >= LEAST_SPEEDUP),
        (f"extra peak under {MOST_OF_CUBE:.0%} of the cube, even over lean", space["over lean"] < MOST_OF_CUBE),
    ):
        print(f"target {'reached' if reached else 'MISSED'}: {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the logit lens.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is steadiest beside other work")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = build(options.device)
    passes = Passes(*models, SECONDS_TIMED)
    introduce(passes, options.device, options.threads)
    space, times = memory(Passes(*models, SECONDS_MEASURED), options.device), race(passes)
    report(times, space)
    if options.json:
        options.json.write_text(json.dumps({"times": times, "memory": space}, indent=1) + "\n")
    if not max(times["off model"], times["off replaced"]) <= TOLERANCE:
        sys.exit(f"the values disagree by more than {TOLERANCE:g}.")


if __name__ == "__main__":
    main()

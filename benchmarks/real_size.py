"""The published models at their real size, without their weights: do names and shapes fit, and what will the lens take?

    python benchmarks/real_size.py

Each model is built from its published configuration on the meta device, where a tensor has a shape and no numbers.
Every parameter of the published checkpoint (tests/published/, see its README) is sent through the renaming and
splitting that loading does, and must arrive at a parameter of its shape; none may be left over on either side. Then the
lens's plan is made for a clip of 30 s, and memory is told for bf16.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2AudioConfig, WhisperFeatureExtractor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import families, load
from audio_lens_plugin.patches.desta.checkpoint import our_name
from audio_lens_plugin.patches.desta.configuration import DestaConfig
from audio_lens_plugin.patches.qwen_audio.configuration import QwenAudioConfig
from audio_lens_plugin.recipes.engine import Plan
from audio_lens_plugin.recipes.logit_lens import plan

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "published"
SECONDS, RATE = 30, 16_000
QUESTION, ANSWER = "What animal makes the sound?", "The sound file's animal is"
Shapes = dict[str, tuple[int, ...]]


def published(name: str) -> dict[str, Any]:
    """What is known of a published checkpoint: repo, family, configuration, dtype, parameters."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def expanded(patterns: dict[str, list[int]]) -> Shapes:
    """One entry per parameter: ``layers.{0:32}.fc1`` stands for 32 of them."""
    shapes = {}
    for pattern, shape in patterns.items():
        bounds = re.search(r"\{(\d+):(\d+)\}", pattern)
        names = [pattern]
        if bounds:
            names = [pattern.replace(bounds[0], str(index)) for index in range(int(bounds[1]), int(bounds[2]))]
        shapes |= {name: tuple(shape) for name in names}
    return shapes


def build(told: dict[str, Any]) -> PreTrainedModel:
    """The model of a published configuration, on the meta device and in the published dtype."""
    config = {
        "qwen2_audio": lambda fields: Qwen2AudioConfig(**fields),
        "qwen_audio": QwenAudioConfig.from_published,
        "desta": lambda fields: DestaConfig(**fields),
    }[told["family"]](told["config"])
    with torch.device("meta"):
        model = families()[told["family"]].model_class()(config)
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, told["dtype"]))
    return model.eval()


def arrived(model: PreTrainedModel, told: dict[str, Any]) -> Shapes:
    """Where loading puts each published parameter, and with which shape."""
    if told["family"] == "desta":
        return put_together(told["parameters"])
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    own = model.state_dict()
    shapes = {}
    for name, shape in expanded(told["parameters"]).items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is None:
            shapes[renamed] = shape
            continue
        converter = copy.deepcopy(next(step for step in converters if pattern in step.source_patterns))
        converter.add_tensor(renamed, name, pattern, torch.empty(shape, device="meta"))
        parts = converter.convert(renamed, model=model, config=model.config)
        shapes |= {part: tuple(tensor.shape) for part, tensor in parts.items()}
    return shapes


def put_together(parts: dict[str, dict[str, list[int]]]) -> Shapes:
    """DeSTA: a Llama, a Whisper and a connector take their places (`patches.desta.checkpoint`)."""
    llama = {
        name.replace("model.", "model.language_model.", 1): shape for name, shape in expanded(parts["llama"]).items()
    }
    whisper = {f"model.whisper.{name}": shape for name, shape in expanded(parts["whisper"]).items()}
    head = whisper["model.whisper.model.decoder.embed_tokens.weight"]
    whisper["model.whisper.proj_out.weight"] = head  # tied to the decoder's embedding, not stored
    connector = {
        f"model.multi_modal_projector.{our_name(name)}": shape for name, shape in expanded(parts["connector"]).items()
    }
    return {**llama, **whisper, **connector}


def faults(name: str) -> list[str]:
    """What does not fit between a published checkpoint and our model of it; nothing, if all is well."""
    told = published(name)
    model = build(told)
    found, needed = arrived(model, told), {key: tuple(value.shape) for key, value in model.state_dict().items()}
    told_faults = [f"{key} is not published" for key in sorted(set(needed) - set(found))]
    told_faults += [f"{key} has no place" for key in sorted(set(found) - set(needed))]
    told_faults += [
        f"{key}: published {found[key]}, needed {needed[key]}"
        for key in sorted(set(found) & set(needed))
        if found[key] != needed[key]
    ]
    return told_faults


def with_ears(model: PreTrainedModel, told: dict[str, Any]) -> LALM:
    """The model with the real window and the toy's words: enough to make a prompt, whose positions are then real."""
    toy = {"qwen2_audio": "toy/qwen2-audio", "qwen_audio": "toy/qwen-audio", "desta": "toy/desta2"}[told["family"]]
    processor = copy.copy(load(toy).processor)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=model.config.audio_config.num_mel_bins)
    if told["family"] == "desta":
        processor.prompt_size = told["config"]["prompt_size"]
    return LALM(model, processor, families()[told["family"]], told["repo"])


def lens_plan(name: str) -> Plan:
    """What the lens takes for one clip of 30 s, read at the last position, nine labels."""
    told = published(name)
    lalm = with_ears(build(told), told)
    clip = Clip(np.zeros(SECONDS * RATE, dtype=np.float32), RATE, "30 s")
    said = "speech" if lalm.family.transcribes else None
    return plan(lalm, lalm.prompt(clip, question=QUESTION, answer=ANSWER, transcript=said), labels=9)


def main() -> int:
    header = ("model", "parameters", "weights GB", "layers read", "positions of 30 s", "lens holds MB", "result KB")
    print(" | ".join(header))
    sound = True
    for path in sorted(PUBLISHED.glob("*.json")):
        told = published(path.stem)
        count = sum(parameter.numel() for parameter in build(told).parameters())
        wanted = lens_plan(path.stem)
        cells = (told["repo"], f"{count:,}", f"{wanted.weights / 1e9:.2f}", wanted.layers, wanted.positions)
        print(" | ".join(map(str, (*cells, f"{wanted.working / 1e6:.0f}", f"{wanted.result / 1e3:.1f}"))))
        for fault in faults(path.stem):
            print("  does not fit:", fault)
            sound = False
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())

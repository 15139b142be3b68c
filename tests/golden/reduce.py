"""Make the committed sample of the golden numbers: ``python tests/golden/reduce.py FULL`` (run from the repository)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from golden import HERE, real_places, spread

KEPT = 400  # elements of a tensor
WHOLE = ("input_ids", "attention_mask", "gen.new_tokens", "input_audio_lengths", "audio_span_tokens", "ntk_alpha")


def reduced(name: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Inputs whole, sounds as the 16-bit numbers they are, a spread sample of the rest."""
    if name.startswith("waveform"):
        samples = tensor * 32_768
        assert torch.equal(samples, samples.round()), name
        return samples.to(torch.int16)
    if name in WHOLE or tensor.numel() <= KEPT:
        return tensor
    places = real_places(tensor, mask)
    return tensor.flatten()[places[spread(len(places), KEPT)]].contiguous()


def main() -> None:
    for family in ("qwen_audio", "desta2"):
        source, target = Path(sys.argv[1]) / family, HERE / family
        target.mkdir(exist_ok=True)
        tensors = load_file(source / "cases.safetensors")
        kept = {}
        for name, tensor in tensors.items():
            case, key = name.split("/", 1)
            kept[name] = reduced(key, tensor, tensors.get(f"{case}/attention_mask"))
        save_file(kept, target / "cases.safetensors")
        for name in ("cases.json", "config.json"):
            (target / name).write_text(json.dumps(json.loads((source / name).read_text())))
        for path in [source / "weights.safetensors", *source.glob("tiny_*.json")]:
            shutil.copyfile(path, target / path.name)
        print(family, sum(path.stat().st_size for path in target.iterdir()))


if __name__ == "__main__":
    main()

"""The published models at their real size, on the meta device: names, shapes and plans (benchmarks/real_size.py)."""

from __future__ import annotations

import pytest
import real_size
import torch

NAMES = [path.stem for path in sorted(real_size.PUBLISHED.glob("*.json"))]
PARAMETERS = {"qwen2_audio": 8_397_094_912, "qwen_audio": 8_396_222_464}
POSITIONS = {"qwen2_audio": 750, "qwen_audio": 750, "desta2": 64, "desta2.5": 64}


@pytest.mark.parametrize("name", NAMES)
def test_every_published_parameter_has_its_place(name: str) -> None:
    assert real_size.faults(name) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.pop("transformer.ln_f.weight"), "model.language_model.norm.weight is not published"),
        (lambda table: table.update({"transformer.extra": [3]}), "transformer.extra has no place"),
        (lambda table: table.update({"lm_head.weight": [7, 4096]}), r"lm_head.weight: published \(7, 4096\)"),
        (
            lambda table: table.update({"transformer.h.{0:32}.attn.c_attn.weight": [3 * 4090, 4096]}),
            r"q_proj.weight: published \(4090, 4096\), needed \(4096, 4096\)",
        ),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch, change, told: str) -> None:
    table = real_size.published("qwen_audio")
    change(table["parameters"])
    monkeypatch.setattr(real_size, "published", lambda name: table)
    with pytest.raises(AssertionError, match=told):
        assert not (found := real_size.faults("qwen_audio")), "\n".join(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_for_thirty_seconds(name: str) -> None:
    told = real_size.published(name)
    model = real_size.build(told)
    plan = real_size.lens_plan(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS.get(name, count)
    single = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.float32)
    assert plan.weights == 2 * count + 2 * single  # DeSTA's Whisper and connector stay in float32
    assert (single > 0) == (told["family"] == "desta")
    assert plan.layers == 33
    words, width = model.lm_head.weight.shape
    assert plan.working == 128 * (2 * width + 6 * words)  # a chunk of states, and their logits in bf16 and in fp32
    assert plan.result == 33 * (9 + 1) * 4


@pytest.mark.parametrize("name", NAMES)
def test_audio_positions_of_thirty_seconds(name: str) -> None:
    told = real_size.published(name)
    with_words = real_size.lens_plan(name).positions
    lalm = real_size.with_ears(real_size.build(told), told)
    words = lalm.prompt(question=real_size.QUESTION, answer=real_size.ANSWER)
    assert POSITIONS[name] < with_words - words.shape[1] < POSITIONS[name] + 15  # and the tags around them

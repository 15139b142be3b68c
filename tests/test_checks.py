"""The invariants hold on every model here, and each fails on a model that breaks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import MODELS, open_model
from typer.testing import CliRunner

from audio_lens_plugin import checks
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.checks import Probe
from audio_lens_plugin.cli import app
from audio_lens_plugin.lalm import LALM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_every_invariant_holds(model: str, dtype: torch.dtype) -> None:
    result = open_model(model, dtype).check()
    assert result.passed, result
    assert len(result.findings) == len(checks.invariants())


def test_recipes_add_their_invariants() -> None:
    names = [invariant.__name__ for invariant in checks.invariants()]
    assert "the_lens_ends_in_the_models_logits" in names
    assert len(names) == len(set(names))


@pytest.fixture
def broken() -> LALM:
    return open_model("toy/qwen2-audio")


def failing(lalm: LALM) -> set[str]:
    return {finding.name for finding in lalm.check().findings if not finding.held}


def test_a_deaf_model_is_found_out(broken: LALM) -> None:
    with torch.no_grad():
        broken.module.model.multi_modal_projector.linear.weight.zero_()
    assert failing(broken) == {"another clip changes the logits", "silence changes the logits"}


def test_a_weight_that_is_not_finite_is_found_out(broken: LALM) -> None:
    with torch.no_grad():
        broken.module.lm_head.weight[5] = float("nan")
    found = broken.check()
    assert "lm_head.weight" in found.findings[0].note
    assert not found.findings[0].held
    assert "logits are finite" in failing(broken)


def test_a_mask_that_is_ignored_is_found_out(broken: LALM) -> None:
    forward = broken.module.forward

    def without_mask(*args, **kwargs):
        return forward(*args, **{**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])})

    broken.module.forward = without_mask
    probe = Probe(broken, checks.SYNTHETIC)
    batch = probe.batch(*probe.clips)
    alone = torch.cat([broken.module(**broken.inputs(probe.batch(clip))).logits[:, -1] for clip in probe.clips])
    together = broken.module(**broken.inputs(batch)).logits[:, -1]
    assert not probe.rounding("", together.detach(), alone.detach()).held


def test_a_difference_is_measured_in_standard_deviations() -> None:
    wanted = torch.tensor([0.0, 2.0, 0.0, 2.0])
    assert checks.distance(wanted + 0.1, wanted) == pytest.approx(0.1 / float(wanted.std()))
    assert checks.distance(wanted * float("nan"), wanted) == float("inf")
    assert not checks.at_most("", wanted + 0.1, wanted, 0.05).held


def test_one_clip_is_too_few(toy: LALM, clips: list[Clip]) -> None:
    with pytest.raises(ValueError, match="two different clips"):
        toy.check(clips[:1])


def test_an_invariant_that_cannot_run_has_failed(toy: LALM, monkeypatch: pytest.MonkeyPatch) -> None:
    def an_impossible_one(probe: Probe) -> checks.Finding:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(checks, "INVARIANTS", (checks.logits_are_finite, an_impossible_one))
    result = toy.check()
    assert not result.passed
    assert [finding.held for finding in result.findings[:2]] == [True, False]
    assert "RuntimeError: no such thing" in str(result)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = CliRunner().invoke(app, ["check", "toy/qwen2-audio", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "all invariants hold" in done.output
    assert json.loads(out.read_text())["passed"]


def test_the_command_fails_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HEARD", 1e9)
    done = CliRunner().invoke(app, ["check", "toy/qwen2-audio"])
    assert done.exit_code == 1
    assert "FAILS" in done.output

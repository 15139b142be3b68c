"""One model, two libraries: the same site read through nnsight and through TransformerLens gives the same numbers.

Tolerance 2e-5 (values of order 1): the bridge runs eager attention, nnsight the model's own (sdpa). Padding positions
are left out: their attention rows are meaningless and the two implementations fill them differently.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from models import MODELS, open_model
from transformer_lens import patching
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import families, join_transformer_lens, toys
from audio_lens_plugin.prompts import PromptError

CLOSE = dict(atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module", params=MODELS)
def lalm(request: pytest.FixtureRequest) -> LALM:
    return open_model(request.param)


@pytest.fixture(scope="module")
def batch(lalm: LALM, clips: list[Clip]):
    return lalm.prompt(clips, question="What animal makes the sound?", answer="The sound file's animal is")


@pytest.fixture(scope="module")
def bridged(lalm: LALM, batch):
    bridge = lalm.bridge()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(batch)
    return bridge, logits, cache


def test_logits_agree(lalm: LALM, batch, bridged) -> None:
    _, logits, _ = bridged
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = lalm.module(**lalm.inputs(batch)).logits
    torch.testing.assert_close(logits[real], plain[real], **CLOSE)


@pytest.mark.parametrize("site", ops.SITES)
@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_text_site_agrees(lalm: LALM, batch, bridged, site: str, layer: int) -> None:
    layer %= lalm.n_layers
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad(), lalm.trace(batch):
        value = ops.SITES[site](lalm.blocks[layer], lalm.d_head).save()
    other = bridged[2][f"blocks.{layer}.{site}"]
    assert value.shape == other.shape
    torch.testing.assert_close(value[real], other[real], **CLOSE)


def test_the_audio_tower_is_hooked_layer_by_layer(lalm: LALM, batch, bridged) -> None:
    for layer in range(len(lalm.audio_encoder.blocks)):
        with torch.no_grad(), lalm.trace(batch):
            entering = lalm.audio_encoder.blocks[layer].input.save()
            attended = lalm.audio_encoder.blocks[layer].attn.output.save()
            leaving = lalm.audio_encoder.blocks[layer].output.save()
        name = f"audio_encoder.blocks.{layer}"
        torch.testing.assert_close(entering, bridged[2][f"{name}.hook_resid_pre"], **CLOSE)
        torch.testing.assert_close(_tensor(attended), bridged[2][f"{name}.hook_attn_out"], **CLOSE)
        torch.testing.assert_close(_tensor(leaving), bridged[2][f"{name}.hook_resid_post"], **CLOSE)


def _tensor(output) -> torch.Tensor:
    """Some towers' modules give a tensor, others a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def test_tower_attention_has_the_towers_heads(lalm: LALM, bridged) -> None:
    tower = lalm.audio_encoder._module.config
    z = bridged[2]["audio_encoder.blocks.0.attn.hook_z"]
    if z.ndim == 2:
        pytest.skip("this tower lays all frames end to end: TransformerLens splits heads of batched activations only")
    assert z.shape[-2:] == (tower.encoder_attention_heads, tower.d_model // tower.encoder_attention_heads)


def test_the_bridge_holds_the_very_same_weights(lalm: LALM, bridged) -> None:
    own = {parameter.data_ptr() for parameter in lalm.module.parameters()}
    theirs = {parameter.data_ptr() for parameter in bridged[0].original_model.parameters()}
    assert own == theirs


def test_a_hook_on_the_bridge_leaves_the_model_alone(lalm: LALM, batch, bridged) -> None:
    bridge, logits, _ = bridged
    inputs = lalm.inputs(batch)
    with torch.no_grad():
        before = lalm.module(**inputs).logits
        edited = bridge.run_with_hooks(batch, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value * 0)])
        after = lalm.module(**inputs).logits
    assert torch.equal(before, after)
    assert (edited[:, -1] - logits[:, -1]).abs().max() > 1e-3


def test_a_hook_in_the_tower_changes_the_answer(batch, bridged) -> None:
    bridge, logits, _ = bridged
    with torch.no_grad():
        edited = bridge.run_with_hooks(
            batch, fwd_hooks=[("audio_encoder.blocks.0.hook_resid_post", lambda value, hook: value * 0)]
        )
    assert (edited[:, -1] - logits[:, -1]).abs().max() > 1e-3


def test_calling_the_bridge_takes_a_batch(batch, bridged) -> None:
    with torch.no_grad():
        assert torch.equal(bridged[0](batch), bridged[1])


def test_tokens_with_their_audio_as_keywords_work_too(lalm: LALM, batch, bridged) -> None:
    inputs = lalm.inputs(batch)
    with torch.no_grad():
        assert torch.equal(bridged[0](inputs.pop("input_ids"), **inputs), bridged[1])


def test_tokens_that_would_drop_the_audio_are_refused(lalm: LALM, batch, bridged) -> None:
    ids = batch.inputs["input_ids"]
    for call in (bridged[0], bridged[0].run_with_cache, bridged[0].generate):
        with pytest.raises(PromptError, match="the audio would be lost"):
            call(ids, attention_mask=batch.inputs["attention_mask"])


@pytest.mark.parametrize("cached", [True, False], ids=["with cache", "without cache"])
def test_the_bridge_generates_what_the_model_does(lalm: LALM, batch, bridged, cached: bool) -> None:
    plain = lalm.generate(batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ours = bridged[0].generate(
        batch, max_new_tokens=5, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, verbose=False
    )
    new = batch.shape[1]
    scores = _next_scores(lalm, plain[:, :-1], batch)
    assert torch.equal(ours[:, :new], batch.inputs["input_ids"])
    for row in range(len(batch)):
        for step in range(5):
            chosen, other = (ids[row, new + step] for ids in (plain, ours))
            if chosen != other:  # a tie within rounding may fall either way, and what follows then differs
                assert float(scores[row, step, chosen] - scores[row, step, other]) < 1e-4
                break


def _next_scores(lalm: LALM, ids: torch.Tensor, batch) -> torch.Tensor:
    """Logits of each generated step by one full pass, as the independent truth."""
    inputs = lalm.inputs(batch)
    extra = ids.shape[1] - batch.shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)
    with torch.no_grad():
        return lalm.module(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, batch.shape[1] - 1 :]


def test_transformer_lens_patching_runs_with_the_audio(lalm: LALM, clips: list[Clip], bridged) -> None:
    """The clean run hears another clip than the corrupted one: what is carried over is what was heard."""
    bridge = bridged[0]
    short = replace(clips[1], waveform=clips[1].waveform[:1_600])  # a few positions: TransformerLens runs every cell
    corrupted = lalm.prompt(short.silenced(), transcript=_same_words(lalm), answer="It is")
    clean = lalm.prompt(short, transcript=_same_words(lalm), answer="It is")
    cells = pd.DataFrame({"layer": range(lalm.n_layers), "pos": clean.shape[1] - 1})
    with torch.no_grad():
        wanted, cache = bridge.run_with_cache(clean)
        start = bridge(corrupted)
        best = int((wanted - start)[0, -1].argmax())

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[0, -1, best]

        before = patching.get_act_patch_resid_pre(bridge, corrupted, cache, metric)
        after = patching.generic_activation_patch(
            bridge, corrupted, cache, metric, patching.layer_pos_patch_setter, "resid_post", index_df=cells
        )
    torch.testing.assert_close(after[-1], wanted[0, -1, best], **CLOSE)
    words = [col for col in range(clean.shape[1]) if col not in clean.at("audio").cols]
    assert before.shape == (lalm.n_layers, clean.shape[1])
    torch.testing.assert_close(before[0, words], start[0, -1, best].expand(len(words)), **CLOSE)  # the same words
    assert float((before[0, clean.at("audio").cols] - start[0, -1, best]).abs().max()) > 1e-3


def _same_words(lalm: LALM) -> str | None:
    return "words" if lalm.family.transcribes else None


@pytest.mark.parametrize("toy", toys())
def test_transformer_lens_alone_boots_our_folders(toy: str, clips: list[Clip]) -> None:
    lalm = open_model(toy)
    booted = TransformerBridge.boot_transformers(str(toys()[toy]), device="cpu")
    batch = lalm.prompt(clips, answer="It is")
    inputs = lalm.inputs(batch)
    with torch.no_grad():
        plain = lalm.module(**inputs).logits
        logits, cache = booted.run_with_cache(inputs.pop("input_ids"), **inputs)
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], plain[real], **CLOSE)
    assert "audio_encoder.blocks.0.hook_resid_post" in cache


def test_transformer_lens_finds_our_adapters_by_entry_points() -> None:
    """In a process that does not import this package."""
    code = (
        "from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory as F, "
        "SUPPORTED_ARCHITECTURES as known; F.discover_entry_points(); "
        "print((set(F._adapters) - set(known), set(known)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    ours = {family.model_class().__name__ for family in families().values()}
    found, known = ast.literal_eval(done.stdout)
    assert found == ours - known, done.stderr


def test_only_the_classes_that_families_load_are_registered() -> None:
    """A text-only Qwen has the architecture that Qwen-Audio was published with: it is not ours to claim."""
    join_transformer_lens()
    assert "QWenLMHeadModel" not in SUPPORTED_ARCHITECTURES
    assert {family.model_class().__name__ for family in families().values()} <= set(SUPPORTED_ARCHITECTURES)

"""One model, two libraries: the same site read through nnsight and through TransformerLens gives the same numbers.

Tolerance 2e-5 (values of order 1): the bridge runs eager attention, nnsight the model's own (sdpa). Padding positions
are left out: their attention rows are meaningless and the two implementations fill them differently.
"""

from __future__ import annotations

import pytest
import torch

from audio_lens_plugin import ops
from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import load, toys

CLOSE = dict(atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module", params=toys())
def lalm(request: pytest.FixtureRequest) -> LALM:
    return load(request.param)


@pytest.fixture(scope="module")
def batch(lalm: LALM, clips: list[Clip]):
    return lalm.prompt(clips, question="What animal makes the sound?", answer="The sound file's animal is")


@pytest.fixture(scope="module")
def bridged(lalm: LALM, batch):
    bridge = lalm.bridge()
    inputs = lalm.inputs(batch)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
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
            attended = lalm.audio_encoder.blocks[layer].attn.output[0].save()
            leaving = lalm.audio_encoder.blocks[layer].output.save()
        name = f"audio_encoder.blocks.{layer}"
        torch.testing.assert_close(entering, bridged[2][f"{name}.hook_resid_pre"], **CLOSE)
        torch.testing.assert_close(attended, bridged[2][f"{name}.hook_attn_out"], **CLOSE)
        torch.testing.assert_close(leaving, bridged[2][f"{name}.hook_resid_post"], **CLOSE)


def test_tower_attention_has_the_towers_heads(lalm: LALM, bridged) -> None:
    tower = lalm.module.config.audio_config
    z = bridged[2]["audio_encoder.blocks.0.attn.hook_z"]
    assert z.shape[-2:] == (tower.encoder_attention_heads, tower.d_model // tower.encoder_attention_heads)


def test_the_bridge_holds_the_very_same_weights(lalm: LALM, bridged) -> None:
    own = {parameter.data_ptr() for parameter in lalm.module.parameters()}
    theirs = {parameter.data_ptr() for parameter in bridged[0].original_model.parameters()}
    assert own == theirs


def test_a_hook_on_the_bridge_leaves_the_model_alone(lalm: LALM, batch, bridged) -> None:
    bridge, logits, _ = bridged
    inputs = lalm.inputs(batch)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        before = lalm.module(input_ids=ids, **inputs).logits
        edited = bridge.run_with_hooks(
            ids, fwd_hooks=[("blocks.2.hook_resid_post", lambda value, hook: value * 0)], **inputs
        )
        after = lalm.module(input_ids=ids, **inputs).logits
    assert torch.equal(before, after)
    assert (edited[:, -1] - logits[:, -1]).abs().max() > 1e-3

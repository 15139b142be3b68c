"""Edits of the audio tower against plain hooks on whole passes."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, open_model

from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.recipes.cells import CellError, store
from audio_lens_plugin.recipes.ears import EarWrite, frames_of, hear

IDS = torch.tensor([5, 50])


@pytest.mark.parametrize("name", MODELS)
def test_an_edited_tower_equals_a_whole_pass_with_a_hook(name: str, clips: list) -> None:
    lalm = open_model(name)
    batch = lalm.prompt(clips[1:], question="What is heard?")
    run = store(lalm, batch, IDS, tower=True)
    depth, frames = len(lalm.audio_encoder.blocks), frames_of(1.0, (0.2, 0.6))
    if len(run.tower[0]) != 2:
        with pytest.raises(CellError, match="no axis of clips"):
            hear(lalm, run, [EarWrite(0, 0, frames, torch.zeros(len(frames), run.tower[0].shape[-1]))])
        return
    writes = [
        EarWrite(row, layer, frames, run.tower[layer + 1][1 - row, frames + 3])
        for layer in {depth - 1, 0, depth // 2}
        for row in (0, 1)
    ]
    found = hear(lalm, run, writes, batch_size=2)
    twin = weight_sharing_twin(lalm.module)
    for write, vectors in zip(writes, found, strict=True):
        block = twin.get_submodule(_path(lalm, write.layer))

        def hook(module, args, out, write=write):
            state = (out[0] if isinstance(out, tuple) else out).clone()
            state[write.row, write.frames] = write.values
            return (state, *out[1:]) if isinstance(out, tuple) else state

        seen = []
        entrance = twin.get_decoder().layers[0]
        keep = entrance.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with block.register_forward_hook(hook), keep, torch.no_grad():
            twin(**lalm.inputs(batch))
        wanted = seen[0][write.row, batch.at("audio").row(write.row)]
        torch.testing.assert_close(vectors, wanted, atol=1e-5, rtol=1e-5)
        assert (vectors - run.states[0][write.row, batch.at("audio").row(write.row)]).abs().max() > 1e-3


def _path(lalm, layer: int) -> str:
    wanted = lalm.audio_encoder.blocks[layer]._module
    return next(name for name, module in lalm.module.named_modules() if module is wanted)


def test_a_self_patch_of_the_tower_changes_nothing(toy, clips: list) -> None:
    run = store(toy, toy.prompt(clips[:1], question="What is heard?"), IDS, tower=True)
    frames = frames_of(0.5)
    depth = len(toy.audio_encoder.blocks)
    writes = [EarWrite(0, layer, frames, run.tower[layer + 1][0, frames]) for layer in range(depth)]
    cols = run.batch.at("audio").row(0)
    for vectors in hear(toy, run, writes):
        torch.testing.assert_close(vectors, run.states[0][0, cols], atol=1e-5, rtol=1e-5)


def test_seconds_become_frames() -> None:
    assert frames_of(1.0).tolist() == list(range(50))
    assert frames_of(1.0, (0.5, 0.6)).tolist() == [25, 26, 27, 28, 29]
    assert frames_of(1.0, (0.5, 9.0)).tolist() == list(range(25, 50))

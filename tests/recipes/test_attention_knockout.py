"""Knockouts against attention that is computed by hand: projections, rotation, softmax, values, in plain torch."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from models import MODELS, open_model
from nnsight import save

import audio_lens_plugin as alp
from audio_lens_plugin.bridge import weight_sharing_twin
from audio_lens_plugin.checks import EXACT
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.prompts import PromptBatch, Sample
from audio_lens_plugin.recipes.attention_knockout import (
    KnockoutResult,
    attention_knockout,
    knockout_table,
)
from audio_lens_plugin.recipes.cells import Cell, CellError, Cut, run_cells, store
from audio_lens_plugin.recipes.cuts import control_readings, knocked_out, readings
from audio_lens_plugin.recipes.twins import positions_of
from audio_lens_plugin.spans import Role, SpanError

TOLERANCE = 1e-5
IDS = torch.tensor([5, 50, 500])
WORDS = ("dog", "cat", "cow")


def with_attention(lalm: LALM, implementation: str) -> LALM:
    lalm.module.set_attn_implementation(implementation)
    return lalm


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> LALM:
    return open_model(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def lalm(request: pytest.FixtureRequest, family: LALM) -> LALM:
    return with_attention(family, request.param)


@pytest.fixture(scope="module")
def eager() -> LALM:
    return alp.load("toy/qwen2-audio", attn_implementation="eager")


@pytest.fixture(scope="module")
def samples(clips: list) -> list[Sample]:
    return [sample(clip, label) for clip, label in zip(clips, WORDS, strict=True)]


def sample(clip: Any, label: str, **words: Any) -> Sample:
    said = {"question": "What animal makes the sound?", "answer": "The animal is", "attribute": "animal", **words}
    return Sample(f"{clip.name} {label}", alp.Prompt(clips=(clip,), **said), label)


def batch_of(lalm: LALM, clips: list, rows: int = 2) -> PromptBatch:
    """Rows of different length, so that all but the longest are padded."""
    return lalm.prompt(
        clips[:rows], question=["What is heard?", "What is heard in this clip?"][:rows], answer="It is a"
    )


def turned(state: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = state.chunk(2, dim=-1)
    return state * cos + torch.cat([-second, first], dim=-1) * sin


def by_hand(module: Any, given: dict[str, Any], hidden: torch.Tensor, real: torch.Tensor, cut: dict) -> torch.Tensor:
    """What an attention module gives ``[batch, pos, d_model]`` where a cut is made; loops over rows and heads.

    Checkpoints with fused projections (Qwen-Audio) are split when they load, so all have q, k, v apart.
    """
    width = module.head_dim
    split = lambda flat: flat.unflatten(-1, (-1, width)).transpose(1, 2)  # noqa: E731
    queries, keys, values = (split(part(hidden)) for part in (module.q_proj, module.k_proj, module.v_proj))
    cos, sin = (part if part.ndim == 3 else part[0] for part in given["position_embeddings"])
    queries, keys = (turned(part, cos[:, None], sin[:, None]) for part in (queries, keys))
    if given.get("query_scale") is not None:  # logn
        queries = queries * given["query_scale"][:, None, :, None]
    out = torch.zeros(*hidden.shape[:2], queries.shape[1], width)
    for row in range(len(hidden)):
        may = torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool() & real[row]
        for head in range(queries.shape[1]):
            shared = head // (queries.shape[1] // keys.shape[1])
            scores = queries[row, head] @ keys[row, shared].T / width**0.5
            weights = scores.masked_fill(~may, -torch.inf).softmax(-1).nan_to_num()
            if cut["heads"] is None or head in cut["heads"]:
                weights = changed(weights, cut, row)
            out[row, :, head] = weights @ values[row, shared]
    return module.o_proj(out.flatten(2))


def changed(weights: torch.Tensor, cut: dict, row: int) -> torch.Tensor:
    weights = weights.clone()
    for query in cut["queries"][row].tolist():
        keys = [key for key in cut["keys"][row].tolist() if key < query]
        if not keys:
            continue
        if cut["how"] == "spread":
            weights[query, keys] = cut["strength"] * weights[query, keys].mean()
        else:
            weights[query, keys] *= cut["strength"]
        if cut["how"] == "mask":
            weights[query] /= weights[query].sum()
    return weights


@contextmanager
def attention_by_hand(module: Any, layers: list[int], real: torch.Tensor, cut: dict):
    """A model whose attention is computed by hand in some layers; yields what it gave there."""
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int):
        def replace(attention: Any, args: Any, kwargs: Any, given: Any) -> Any:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            out = by_hand(attention, kwargs, hidden, real, cut)
            seen[layer] = torch.where(real[..., None], out, given[0])
            return (seen[layer], *given[1:])

        return replace

    blocks = module.get_decoder().layers
    handles = [blocks[layer].self_attn.register_forward_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hand_made(
    lalm: LALM, batch: PromptBatch, queries: str, keys: str, layers: list[int], heads=None, strength=0.0, how="mask"
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Last logits, and what attention gave in the cut layers."""
    twin = weight_sharing_twin(lalm.module)
    rows = range(len(batch))
    cut = {"heads": heads, "strength": strength, "how": how}
    cut |= {
        "queries": [positions_of(batch, row, queries) for row in rows],
        "keys": [positions_of(batch, row, keys) for row in rows],
    }
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad(), attention_by_hand(twin, layers, real, cut) as seen:
        return twin(**lalm.inputs(batch), use_cache=False).logits[:, -1], seen


def engine_logits(lalm: LALM, batch: PromptBatch, queries: str, keys: str, layers: list[int], **cut: Any) -> Any:
    cells = []
    for row in range(len(batch)):
        cuts = readings(positions_of(batch, row, queries), positions_of(batch, row, keys))
        cells.append(Cell(row, tuple(Cut(layer, *one, **cut) for layer in layers for one in cuts), {}))
    return run_cells(lalm, store(lalm, batch, IDS), cells, IDS).label_logits


def added_by_attention(block: Any) -> Any:
    """What attention adds to the residual stream of a block that is running."""
    entering = block.input.clone()
    return block.ln2.input - entering


def check_by_hand(lalm: LALM, batch: PromptBatch, queries: str, keys: str, **cut: Any) -> None:
    """Engine and context against attention by hand, in two layers together."""
    layers = [0, lalm.n_layers - 1]
    logits, attention = hand_made(lalm, batch, queries, keys, layers, **cut)
    found = engine_logits(lalm, batch, queries, keys, layers, **cut)
    torch.testing.assert_close(found, logits[:, IDS], atol=TOLERANCE, rtol=TOLERANCE)
    with knocked_out(lalm, batch, queries, keys, layers=layers, **cut) as edited:
        with torch.no_grad(), edited.trace(batch, use_cache=False):
            gave = save([added_by_attention(edited.blocks[layer]) for layer in layers])
            end = edited.unembed.output[:, -1].save()
    torch.testing.assert_close(end, logits, atol=TOLERANCE, rtol=TOLERANCE)
    for layer, given in zip(layers, gave, strict=True):
        for row in range(len(batch)):
            cols = positions_of(batch, row, queries)
            torch.testing.assert_close(given[row, cols], attention[layer][row, cols], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("queries", ["last", "question"])
def test_a_cut_equals_attention_by_hand(lalm: LALM, clips: list, rows: int, queries: str) -> None:
    check_by_hand(lalm, batch_of(lalm, clips, rows), queries, "audio")


def test_single_heads_and_strengths_equal_attention_by_hand(lalm: LALM, clips: list) -> None:
    check_by_hand(lalm, batch_of(lalm, clips), "question", "audio", heads=(1,), strength=0.3)
    check_by_hand(lalm, batch_of(lalm, clips), "last", "audio", strength=2.0)


def test_keys_among_the_queries_leave_each_its_own_position(lalm: LALM, clips: list) -> None:
    check_by_hand(lalm, batch_of(lalm, clips), "answer", "answer")


@pytest.mark.parametrize("how", ["zero", "spread"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_weights_changed_after_the_softmax_equal_attention_by_hand(
    family: LALM, clips: list, how: str, strength: float
) -> None:
    lalm = with_attention(family, "eager")
    check_by_hand(lalm, batch_of(lalm, clips), "question", "audio", strength=strength, how=how)
    check_by_hand(lalm, batch_of(lalm, clips), "answer", "answer", strength=strength, how=how, heads=(0,))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_scaled_by_their_position_are_cut_alike(clips: list, implementation: str) -> None:
    """Qwen-Audio scales queries beyond its training length; here all prompts are beyond it."""
    lalm = with_attention(open_model("toy/qwen-audio"), implementation)
    lalm.module.config.get_text_config().seq_length = 8
    batch = batch_of(lalm, clips)
    with torch.no_grad(), lalm.trace(batch) as tracer:
        scale = lalm.blocks[0].attn.inputs[1]["query_scale"].save()
        tracer.stop()
    assert scale.max() > 1.5
    check_by_hand(lalm, batch, "last", "audio")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_cut_changes_something_and_a_cut_of_nothing_does_not(eager: LALM, implementation: str) -> None:
    lalm, words = with_attention(eager, implementation), alp.TRACKS["Animal"].labels
    heard = alp.toy_clips("toy/qwen2-audio", "Animal").samples("open+is+question")[:3]
    results = {
        "cut": attention_knockout(lalm, heard, words, control=False),
        "strength 1": attention_knockout(lalm, heard, words, control=False, strength=1.0),
        "later keys": attention_knockout(lalm, heard, words, "question", "answer", control=False),
    }
    change = {name: found.effects()["probability"].abs().max() for name, found in results.items()}
    assert change["cut"] > 1e-2
    assert change["strength 1"] < EXACT
    assert change["later keys"] < EXACT
    assert results["strength 1"].scores.kl.abs().max() < EXACT
    assert (results["later keys"].cells["blocked"] == 0).all()


def test_the_context_of_nothing_is_the_model(toy: LALM, clips: list) -> None:
    batch = batch_of(toy, clips)
    with torch.no_grad():
        plain = toy.module(**toy.inputs(batch)).logits
        with knocked_out(toy, batch, "question", "answer") as edited:
            assert torch.equal(edited.module(**edited.inputs(batch)).logits, plain)


def test_blocking_everything_is_refused(toy: LALM, clips: list) -> None:
    batch = batch_of(toy, clips)
    everything = batch.inputs["attention_mask"][1].nonzero()[:, 0]
    with pytest.raises(CellError, match="every key of the query"):
        run_cells(toy, store(toy, batch, IDS), [Cell(1, (Cut(0, everything[-1:], everything),))], IDS)


def test_control(toy: LALM, samples: list) -> None:
    """As many other keys as there are: never audio, never the named keys, never the query or what comes after it."""
    batch = toy.batch([one.prompt for one in samples])
    for row, (queries, keys) in enumerate([("last", "audio"), ("question", "system"), ("answer", "question")]):
        cut = readings(positions_of(batch, row, queries), positions_of(batch, row, keys))
        drawn = control_readings(batch, row, keys, cut, seed=7)
        wanted = {query: len(lost) for those, lost in cut for query in those.tolist()}
        roles, named_keys = batch.positions.roles[row], positions_of(batch, row, keys)
        got = {query: lost for those, lost in drawn for query in those.tolist()}
        for query, count in wanted.items():
            lost = got.get(query, torch.zeros(0).long())
            assert not torch.isin(lost, named_keys).any()
            assert (lost < query).all()
            assert not torch.isin(roles[lost], torch.tensor([Role.AUDIO, Role.PAD])).any()
            free = [col for col in range(query) if roles[col] not in (Role.AUDIO, Role.PAD) and col not in named_keys]
            assert len(lost.unique()) == len(lost) == (count if len(free) >= count else max(len(free) - 1, 0))


def test_the_control_depends_on_seed_and_sample_and_not_on_the_batch(toy: LALM, samples: list) -> None:
    def control(**kwargs: Any) -> torch.Tensor:
        found = attention_knockout(toy, samples, WORDS, "last", "question", layers=[2], **kwargs)
        return found.scores.label_logits[torch.tensor(found.cells["cut"] == "control")]

    torch.testing.assert_close(control(), control(batch_size=1), atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(control(), control())
    assert (control() - control(seed=1)).abs().max() > 1e-4


@pytest.mark.parametrize(("window", "cut"), [(1, [3]), (2, [2, 3]), (3, [2, 3, 4])])
def test_a_window_lies_around_its_layer(toy: LALM, samples: list, window: int, cut: list[int]) -> None:
    found = attention_knockout(toy, samples[:2], WORDS, window=window, layers=[3], control=False)
    batch = toy.batch([one.prompt for one in samples[:2]])
    with knocked_out(toy, batch, layers=cut) as edited:
        wanted = edited.answer(batch, WORDS).log_probs
    torch.testing.assert_close(found.scores.log_probs, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_windows_are_clipped_at_both_ends(toy: LALM, samples: list) -> None:
    found = attention_knockout(toy, samples[:1], WORDS, window=3, layers=[0, toy.n_layers - 1], control=False)
    batch = toy.batch([samples[0].prompt])
    for cell, cut in enumerate([[0, 1], [toy.n_layers - 2, toy.n_layers - 1]]):
        with knocked_out(toy, batch, layers=cut) as edited:
            wanted = edited.answer(batch, WORDS).log_probs[0]
        torch.testing.assert_close(found.scores.log_probs[cell], wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_effects_are_cell_minus_clean(toy: LALM, samples: list) -> None:
    found = attention_knockout(toy, samples, WORDS, ["last", "attribute"], ["audio", "question"], layers=[1, 3])
    effects = found.effects()
    assert len(effects) == 2 * 2 * 2 * 2
    assert len(found.cells) == 3 * len(effects)
    frame = found.to_frame()
    line = effects[effects["cut"] == "control"].iloc[2]
    same = frame.merge(line[["queries", "keys", "layer", "cut"]].to_frame().T.astype({"layer": int}))
    clean = [toy.answer(toy.batch([one.prompt]), WORDS).log_probs[0, WORDS.index(one.label)].exp() for one in samples]
    assert line["probability"] == pytest.approx(same["probability"].mean() - float(sum(clean)) / 3, abs=1e-6)
    assert line["probability_low"] <= line["probability"] <= line["probability_high"]
    assert line["samples"] == 3


def test_the_table_leaves_out_what_prompts_do_not_have(toy: LALM, samples: list) -> None:
    found = knockout_table(toy, samples, WORDS, layers=[2], control=False)
    pairs = set(zip(found.cells["queries"], found.cells["keys"], strict=True))
    # Qwen reads no transcript; the attribute's word stands in the answer, after the question, and is one token long.
    assert pairs == {(query, "audio") for query in ("last", "attribute", "question", "text")} | {
        ("last", "attribute"),
        ("text", "attribute"),
    }
    desta = alp.load("toy/desta2")
    pairs = set(zip(*(knockout_table(desta, samples, WORDS, layers=[2]).cells[at] for at in ("queries", "keys"))))  # noqa: B905
    assert {("last", "transcript"), ("attribute", "transcript")} <= pairs


def test_what_is_not_there_is_refused(toy: LALM, samples: list, clips: list) -> None:
    with pytest.raises(SpanError, match="transcript"):
        attention_knockout(toy, samples, WORDS, keys="transcript")
    mixed = [samples[0], Sample("mute", alp.Prompt(question="What animal?", answer="The animal is"), "dog")]
    with pytest.raises(SpanError, match=r"'mute'.*'audio'.*question"):
        attention_knockout(toy, mixed, WORDS)
    with pytest.raises(CellError, match="window=0"):
        attention_knockout(toy, samples, WORDS, window=0)
    with pytest.raises(CellError, match=f"layer {toy.n_layers}"):
        attention_knockout(toy, samples, WORDS, layers=[toy.n_layers])
    with pytest.raises(CellError, match="head 99"):
        attention_knockout(toy, samples, WORDS, heads=[99])
    with pytest.raises(CellError, match="factor of 0 or more"):
        attention_knockout(toy, samples, WORDS, strength=-1.0)
    with pytest.raises(CellError, match="attn_implementation='eager'"):
        attention_knockout(toy, samples, WORDS, how="zero")
    with (
        pytest.raises(CellError, match="attn_implementation='eager'"),
        knocked_out(toy, batch_of(toy, clips), how="spread"),
    ):
        pass


def test_seconds_name_the_audio_that_is_cut(toy: LALM, samples: list) -> None:
    found = attention_knockout(toy, samples[1:], WORDS, keys=["audio", "audio@0-0.5"], layers=[2], control=False)
    blocked = found.cells.set_index("keys")["blocked"]
    assert (blocked["audio@0-0.5"].to_numpy() < blocked["audio"].to_numpy()).all()
    assert (blocked["audio@0-0.5"] > 0).all()


def test_a_result_is_saved_drawn_and_resumed(toy: LALM, samples: list, tmp_path: Any) -> None:
    found = attention_knockout(toy, samples, WORDS, layers=[1, 2], batch_size=2, folder=tmp_path)
    again = attention_knockout(toy, samples, WORDS, layers=[1, 2], batch_size=2, folder=tmp_path)
    assert torch.equal(found.scores.label_logits, again.scores.label_logits)
    assert found.effects().equals(again.effects())
    back = KnockoutResult.load(found.save(tmp_path / "saved"))
    assert back.effects().equals(found.effects())
    assert "last → audio" in repr(back)
    lines = found.plot().axes[0]
    assert len(lines.lines) >= 2
    assert "last → audio" in lines.get_title(loc="left")
    several = attention_knockout(toy, samples, WORDS, ["last", "question"], layers=[1, 2])
    assert len(several.plot("accuracy").axes[0].get_yticklabels()) == 2


def whole_pass(lalm: LALM, batch: PromptBatch, ids: torch.Tensor, queries: list, keys: list, layers: list) -> Any:
    """Logits of one pass over a written text, without a cache, attention by hand in the cut layers."""
    inputs = lalm.inputs(batch)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - batch.shape[1]), value=1)
    twin = weight_sharing_twin(lalm.module)
    cut = {"heads": None, "strength": 0.0, "how": "mask", "queries": queries, "keys": keys}
    with torch.no_grad(), attention_by_hand(twin, layers, mask.bool(), cut):
        return twin(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("queries", ["last", "question"])
def test_generation_equals_whole_passes(lalm: LALM, clips: list, rows: int, queries: str) -> None:
    """``last`` goes on with every new token; ``question`` ends with the prompt."""
    batch, layers = batch_of(lalm, clips, rows), list(range(lalm.n_layers))
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with knocked_out(lalm, batch, queries) as edited:
        made = edited.generate(batch, **settings, output_logits=True, return_dict_in_generate=True)
    past = range(batch.shape[1], made.sequences.shape[1])
    written = torch.tensor(past if queries == "last" else [], dtype=torch.long)
    reading = [torch.cat([positions_of(batch, row, queries), written]) for row in range(rows)]
    keys = [positions_of(batch, row, "audio") for row in range(rows)]
    wanted = whole_pass(lalm, batch, made.sequences, reading, keys, layers)[:, batch.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    plain = lalm.generate(batch, **settings, output_logits=True, return_dict_in_generate=True)
    assert (torch.stack(plain.logits, 1)[:, 0] - wanted[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("how", ["zero", "spread"])
def test_generation_with_weights_changed_after_the_softmax(eager: LALM, clips: list, how: str) -> None:
    lalm = with_attention(eager, "eager")
    batch = batch_of(lalm, clips)
    with knocked_out(lalm, batch, how=how, strength=0.5) as edited:
        kwargs = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True)
        made = edited.generate(batch, **kwargs, return_dict_in_generate=True)
        inputs = edited.inputs(batch)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        with torch.no_grad():
            whole = edited.module(
                **{**inputs, "input_ids": made.sequences, "attention_mask": mask}, use_cache=False
            ).logits[:, batch.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_context_answers_whole_labels_and_searches_beams(toy: LALM, clips: list) -> None:
    batch = batch_of(toy, clips)
    with knocked_out(toy, batch) as edited:
        first, whole = edited.answer(batch, WORDS), edited.answer(batch, WORDS, whole=True, new_tokens=2)
        beams = edited.generate(batch, max_new_tokens=2, num_beams=2, do_sample=False)
    one_token = [index for index, tokens in enumerate(first.labels.tokens) if len(tokens) == 1]
    assert one_token
    assert len(whole.texts) == 2
    assert len(beams) == 2
    torch.testing.assert_close(first.log_probs[:, one_token], whole.log_probs[:, one_token], atol=1e-5, rtol=1e-5)
    assert (toy.answer(batch, WORDS).log_probs - first.log_probs).abs().max() > 1e-3


def test_the_model_itself_is_never_touched(toy: LALM, clips: list) -> None:
    batch = batch_of(toy, clips)
    plain = toy.answer(batch, WORDS).log_probs
    with suppress(RuntimeError), knocked_out(toy, batch) as edited:
        assert torch.equal(toy.answer(batch, WORDS).log_probs, plain)
        raise RuntimeError("the user's")
    assert torch.equal(toy.answer(batch, WORDS).log_probs, plain)
    with pytest.raises(CellError, match="has ended"):
        edited.answer(batch, WORDS)
    with knocked_out(toy, batch) as edited, pytest.raises(CellError, match="another batch"):
        edited.answer(batch_of(toy, clips[1:]), WORDS)


def _unchanged_then_error(toy, batch, plain) -> None:
    """The model itself is not touched inside the context, which an error of the user's ends."""
    assert torch.equal(toy.answer(batch, WORDS).log_probs, plain)
    raise RuntimeError("a user's")

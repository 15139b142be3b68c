"""Qwen-Audio against the numbers of the original code, and the right behaviour where the original has a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import HERE, SOURCES, Golden, golden
from safetensors.torch import save_file
from transformers import DynamicCache, WhisperFeatureExtractor

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.bridge import AudioBridge, bridge_of
from audio_lens_plugin.patches.qwen_audio import FAMILY
from audio_lens_plugin.patches.qwen_audio.configuration import QwenAudioConfig, fields_from_published
from audio_lens_plugin.patches.qwen_audio.modeling import QwenAudioForConditionalGeneration, audio_lengths
from audio_lens_plugin.patches.qwen_audio.tokenization import tokenizer_from_ranks

CASES = ("audio_text", "batch2_two_lengths", "text_only", "two_audios_one_prompt", "batch2_long")
END, PLACEHOLDER = 480, 483
MEL, SPAN, HIDDEN, LOGITS = 2e-5, 1e-5, 2e-5, 5e-5


class Listener:
    """What FAMILY.hear needs of a processor."""

    feature_extractor = WhisperFeatureExtractor(feature_size=80)

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        return samples // 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a published checkpoint: its config.json, its weights in two shards under the original names."""
    numbers, folder = golden("qwen_audio", "committed"), tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text(json.dumps(numbers.config))
    names = sorted(numbers.weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: numbers.weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path, quirks: bool, **kwargs) -> QwenAudioForConditionalGeneration:
    model, report = QwenAudioForConditionalGeneration.from_pretrained(
        folder, original_quirks=quirks, audio_token_id=PLACEHOLDER, output_loading_info=True, **kwargs
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def quirky(folder: Path) -> QwenAudioForConditionalGeneration:
    return load(folder, quirks=True)


@pytest.fixture(scope="module")
def right(folder: Path) -> QwenAudioForConditionalGeneration:
    return load(folder, quirks=False)


def clips_of(numbers: Golden, case: str) -> list[Clip]:
    waves = [numbers.get(case, f"waveform{index}") for index in range(2)]
    return [Clip(wave.numpy(), 16_000, f"clip {index}") for index, wave in enumerate(waves) if wave is not None]


def inputs_of(numbers: Golden, case: str) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": numbers.get(case, "input_ids")}
    if (mask := numbers.get(case, "attention_mask")) is not None:
        inputs["attention_mask"] = mask
    return {**inputs, **FAMILY.hear(Listener(), clips_of(numbers, case), truncate=False).tensors}


def recorded(model: QwenAudioForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor that was recorded of the original, under its name there."""
    found: dict[str, torch.Tensor] = {}
    inner = model.model

    def keep(name: str, entering: bool = False):
        def hook(module, args, output):
            value = args[0] if entering else output
            found[name] = value if isinstance(value, torch.Tensor) else value[0]

        return hook

    tower, language = inner.audio_tower, inner.language_model
    handles = [tower.layers[0].register_forward_hook(keep("audio.block_input", entering=True))]
    handles += [layer.register_forward_hook(keep(f"audio.block{i}")) for i, layer in enumerate(tower.layers)]
    handles += [tower.layer_norm.register_forward_hook(keep("audio.pooled", entering=True))]
    handles += [inner.multi_modal_projector.register_forward_hook(keep("audio.encoder_out"))]
    handles += [language.layers[0].register_forward_hook(keep("hidden.embeds", entering=True))]
    handles += [layer.register_forward_hook(keep(f"hidden.layer{i}")) for i, layer in enumerate(language.layers)]
    handles += [language.norm.register_forward_hook(keep("hidden.ln_f"))]
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
    for handle in handles:
        handle.remove()
    found |= spans(found["hidden.embeds"], inputs["input_ids"], model.config.audio_start_token_id)
    return found


def spans(embeds: torch.Tensor, ids: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """What stands in the sequence from each opening tag to its closing one."""
    opening, closing = ((ids == tag).nonzero().tolist() for tag in (start, start + 1))
    pairs = zip(opening, closing, strict=True)
    return {f"audio.span{i}": embeds[row, first : last + 1] for i, ((row, first), (_, last)) in enumerate(pairs)}


def generated(model: QwenAudioForConditionalGeneration, inputs: dict[str, torch.Tensor], **kwargs):
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=END)
    return model.generate(**inputs, **{**settings, **kwargs}, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_tensor(quirky, case: str, source: str) -> None:
    numbers = golden("qwen_audio", source)
    inputs = inputs_of(numbers, case)
    found = recorded(quirky, inputs)
    made = generated(quirky, inputs)
    found["gen.scores"] = torch.stack(made.logits, dim=1)
    best = found["gen.scores"].topk(2).values
    found["gen.margin"] = best[..., 0] - best[..., 1]
    found["ntk_alpha"] = prompt_stretch(quirky, inputs)
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, numbers.get(case, "gen.new_tokens"))
    if "input_features" in inputs:
        frames = 2 * int(numbers.get(case, "input_audio_lengths")[:, 0].max())
        found["mel"] = inputs["input_features"][..., :frames]
    given = {"input_ids", "attention_mask", "gen.new_tokens", "audio_span_tokens", "input_audio_lengths"}
    given |= {"waveform0", "waveform1"}
    assert numbers.keys(case) - given == set(found), "every key is held"
    for key in numbers.keys(case) - given:
        kind = key.split(".")[0]
        tolerance = {"mel": MEL, "audio": SPAN, "hidden": HIDDEN}.get(kind, LOGITS)
        numbers.check(case, key, found[key], HIDDEN if key.startswith("audio.block") else tolerance)


def prompt_stretch(model: QwenAudioForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The NTK factors of a prompt, of which the original keeps one where all rows share it."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    _, stretch = model.model.language_model._original_positions(mask, 0)
    return stretch if mask.shape[1] > model.config.text_config.seq_length and len(mask) > 1 else stretch[:1]


@pytest.mark.parametrize("case", [case for case in CASES if case != "text_only"])
def test_lengths_and_spans(case: str) -> None:
    numbers = golden("qwen_audio", "committed")
    inputs = inputs_of(numbers, case)
    lengths = numbers.get(case, "input_audio_lengths")
    frames = inputs["feature_attention_mask"].sum(-1)
    assert torch.equal(audio_lengths(frames), lengths[:, 1].long())
    assert torch.equal((frames - 1) // 2 + 1, lengths[:, 0].long())
    assert torch.equal(audio_lengths(frames) + 2, numbers.get(case, "audio_span_tokens"))


@pytest.mark.parametrize("case", ["batch2_two_lengths", "batch2_long"])
def test_a_row_of_a_batch_equals_its_single_run(right, quirky, case: str) -> None:
    """In the original a shorter clip hears on, and padding counts as positions; ours does neither by default."""
    numbers = golden("qwen_audio", "committed")
    inputs, clips = inputs_of(numbers, case), clips_of(numbers, case)
    apart = {}
    for name, model in (("right", right), ("quirky", quirky)):
        with torch.no_grad():
            together = model(**inputs).logits[:, -1]
            alone = torch.cat([model(**single(inputs, clips, row)).logits[:, -1] for row in range(2)])
        apart[name] = float((together - alone).abs().max())
    assert apart["right"] < 5e-5
    assert apart["quirky"] > 1e-3


def single(inputs: dict[str, torch.Tensor], clips: list[Clip], row: int) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"][row].bool()
    heard = FAMILY.hear(Listener(), [clips[row]], truncate=False).tensors
    return {"input_ids": inputs["input_ids"][row, real][None], **heard}


@pytest.mark.parametrize("case", CASES)
def test_cached_generation_equals_a_full_recompute(right, case: str) -> None:
    """audio_text crosses seq_length while it generates: the stretch of the rotary embeddings changes on the way."""
    inputs = inputs_of(golden("qwen_audio", "committed"), case)
    made = generated(right, inputs)
    steps, length = torch.stack(made.logits, dim=1), inputs["input_ids"].shape[1]
    for step in range(steps.shape[1]):
        ids = made.sequences[:, : length + step]
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        mask = torch.nn.functional.pad(mask, (0, step), value=1)
        with torch.no_grad():
            whole = right(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
        assert float((steps[:, step] - whole).abs().max()) < LOGITS
    assert torch.equal(generated(right, inputs, use_cache=False).sequences, made.sequences)


def test_the_original_keeps_the_stretch_of_the_prompt(quirky, right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "audio_text")
    apart = (
        torch.stack(generated(quirky, inputs).logits, 1)[:, -1] - torch.stack(generated(right, inputs).logits, 1)[:, -1]
    )
    assert float(apart.abs().max()) > 1


@pytest.mark.parametrize("case", ["batch2_two_lengths", "text_only"])
def test_a_static_cache_generates_the_same(right, case: str) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), case)
    static = generated(right, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, generated(right, inputs).sequences)


def test_a_fresh_cache_does_not_cost_the_sound(quirky) -> None:
    """The original takes any cache for a sign that the sound was heard already."""
    numbers = golden("qwen_audio", "committed")
    inputs = inputs_of(numbers, "audio_text")
    made = generated(quirky, inputs, past_key_values=DynamicCache()).sequences
    assert torch.equal(made[:, inputs["input_ids"].shape[1] :], numbers.get("audio_text", "gen.new_tokens"))


def test_generation_ends_where_the_original_ends(quirky) -> None:
    """At the first of its stop words; the original then also forces one end token, which says nothing."""
    numbers = golden("qwen_audio", "committed")
    told = numbers.cases["audio_text"]["stop_words_example"]
    inputs = inputs_of(numbers, "audio_text")
    stops = [END, *(stop for (stop,) in told["stop_words_ids"])]
    made = generated(quirky, inputs, eos_token_id=stops).sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert [*made, END] == told["new_tokens"]


def test_embeddings_into_which_the_sound_is_merged_say_the_same(right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "two_audios_one_prompt")
    with torch.no_grad():
        heard = right.model.hear(inputs["input_features"], inputs["feature_attention_mask"])
        embeds = right.model.merge(inputs["input_ids"], right.get_input_embeddings()(inputs["input_ids"]), heard)
        assert torch.equal(right(inputs_embeds=embeds).logits, right(**inputs).logits)


@pytest.mark.parametrize("source", SOURCES)
def test_hidden_states_are_those_of_the_original(quirky, source: str) -> None:
    """As in the original: the embeddings, every block but the last, and the final norm."""
    numbers = golden("qwen_audio", source)
    with torch.no_grad():
        found = quirky(**inputs_of(numbers, "audio_text"), output_hidden_states=True).hidden_states
    names = ["embeds", "layer0", "layer1", "layer2", "ln_f"]
    for name, states in zip(names, found, strict=True):
        numbers.check("audio_text", f"hidden.{name}", states, HIDDEN)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("case", ["two_audios_one_prompt", "batch2_long"])
def test_the_bridge_scales_and_stretches_beyond_seq_length(right, quirky, case: str, quirks: bool) -> None:
    model = quirky if quirks else right
    inputs = inputs_of(golden("qwen_audio", "committed"), case)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        wanted = model(**inputs).logits
        logits, cache = bridged(model).run_with_cache(inputs.pop("input_ids"), **inputs)
    torch.testing.assert_close(logits[real], wanted[real], atol=2e-5, rtol=2e-5)
    for layer in range(4):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"].transpose(1, 2)[real]
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"].transpose(1, 2)[real], scores.softmax(-1))


@pytest.mark.parametrize("hook", ["q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern"])
def test_every_attention_hook_is_on_the_live_path(right, hook: str) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "two_audios_one_prompt")
    bridge, ids = bridged(right), inputs.pop("input_ids")
    name = f"blocks.2.attn.hook_{hook}"
    with torch.no_grad():
        edited = bridge.run_with_hooks(ids, **inputs, fwd_hooks=[(name, lambda value, hook: value * 0.5)])
        assert float((edited - bridge(ids, **inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize("quirks", [False, True])
def test_the_bridge_goes_on_from_its_cache(right, quirky, quirks: bool) -> None:
    """Beyond seq_length, where queries are scaled and rotary embeddings stretched."""
    model = quirky if quirks else right
    inputs = inputs_of(golden("qwen_audio", "committed"), "two_audios_one_prompt")
    bridge, ids = bridged(model), inputs.pop("input_ids")
    with torch.no_grad():
        wanted = bridge(ids, **inputs)[:, -4:]
        cache = DynamicCache()
        bridge(ids[:, :-4], **inputs, past_key_values=cache, use_cache=True)
        found = bridge(ids[:, -4:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def bridged(model: QwenAudioForConditionalGeneration) -> AudioBridge:
    return bridge_of(FAMILY, model, tokenizer_from_ranks(HERE / "qwen_audio" / "ranks.tiktoken"), "tiny", dict)


def test_attention_implementations_agree(folder: Path, right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "batch2_long")
    eager = load(folder, quirks=False, attn_implementation="eager")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        difference = eager(**inputs).logits[real] - right(**inputs).logits[real]
    assert float(difference.abs().max()) < LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, right, dtype: torch.dtype) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "audio_text")
    low = load(folder, quirks=False, dtype=dtype)
    assert {parameter.dtype for parameter in low.parameters()} == {dtype}
    with torch.no_grad():
        wanted = right(**inputs).logits
        found = low(**{**inputs, "input_features": inputs["input_features"].to(dtype)}).logits.float()
    assert torch.isfinite(found).all()
    assert float((found - wanted).square().mean().sqrt() / wanted.std()) < 0.1


def test_what_is_saved_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    saved, inputs = load(folder, quirks=True), inputs_of(golden("qwen_audio", "committed"), "batch2_long")
    saved.save_pretrained(tmp_path)
    again, report = QwenAudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.original_quirks
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, saved(**inputs).logits)


def test_pickled_weights_are_loaded_in_their_own_dtype(folder: Path, tmp_path: Path, right) -> None:
    weights = golden("qwen_audio", "committed").weights
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "pytorch_model.bin")
    low = load(tmp_path, quirks=False, dtype="auto")
    for name, weight in right.state_dict().items():
        assert torch.equal(low.state_dict()[name], weight.bfloat16()), name


@pytest.mark.parametrize("layout", ["published", "ours"])
def test_quirks_asked_for_reach_every_part(folder: Path, tmp_path: Path, layout: str) -> None:
    if layout == "ours":
        load(folder, quirks=False).save_pretrained(tmp_path)
    asked = QwenAudioConfig.from_pretrained(folder if layout == "published" else tmp_path, original_quirks=True)
    assert asked.original_quirks
    assert asked.text_config.original_quirks


def test_a_text_only_qwen_is_refused() -> None:
    told = {name: value for name, value in golden("qwen_audio", "committed").config.items() if name != "audio"}
    with pytest.raises(ValueError, match="text-only Qwen"):
        fields_from_published(told)
    assert not FAMILY.serves(told)
    assert FAMILY.serves(golden("qwen_audio", "committed").config)


def test_gradients_reach_the_sound(right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "audio_text")
    features = inputs["input_features"].requires_grad_()
    right(**{**inputs, "input_features": features}).logits[0, -1].max().backward()
    assert float(features.grad.abs().max()) > 0


def test_a_mask_that_says_no_lengths_is_refused(right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "text_only")
    with pytest.raises(ValueError, match="takes its positions from the mask"):
        right(**{**inputs, "attention_mask": torch.ones(1, 1, 38, 38)})


def test_placeholders_that_do_not_fit_are_refused(right) -> None:
    inputs = inputs_of(golden("qwen_audio", "committed"), "audio_text")
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 30] = 5
    with pytest.raises(ValueError, match="50 audio placeholders do not fit 51 audio positions"):
        right(**inputs)

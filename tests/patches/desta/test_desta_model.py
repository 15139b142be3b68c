"""DeSTA as a model of transformers: caches, embeddings, dtypes, gradients, and checkpoints that are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import golden
from safetensors.torch import load_file, save_file
from test_desta import CASES, clip_of, inputs_of
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache

from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load
from audio_lens_plugin.patches.desta import FAMILY
from audio_lens_plugin.patches.desta.modeling import DestaForConditionalGeneration
from audio_lens_plugin.patches.desta.processing import DestaProcessor
from audio_lens_plugin.prompts import PromptError

NEW = 12
LORA = "llm_model.model.layers.{}.self_attn.{}.lora_{}.default.weight"


@pytest.fixture(scope="module")
def inputs(lalm: LALM) -> dict[str, torch.Tensor]:
    return inputs_of(lalm, golden("desta2", "committed"), "audio16k")


@pytest.fixture
def newer(folder: Path, tmp_path: Path) -> Path:
    """The same parts in DeSTA2.5's layout, without low-rank changes."""
    config = {"model_type": "desta25", "prompt_size": 64, "qformer_num_hidden_layers": 2, "use_lora": False}
    config |= {"llm_model_id": str(folder / "llama"), "encoder_model_id": str(folder / "whisper")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = torch.load(folder / "qformer_connector.pth", weights_only=True)
    save_file(
        {f"perception.connector.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors"
    )
    return tmp_path


def changed(folder: Path, fields: dict, weights: dict[str, torch.Tensor]) -> Path:
    """A folder with other fields in its config.json and more weights."""
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **fields}))
    save_file({**load_file(folder / "model.safetensors"), **weights}, folder / "model.safetensors")
    return folder


def low_rank() -> dict[str, torch.Tensor]:
    """Changes of every kind and layer."""
    widths = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
    return {
        LORA.format(layer, kind, half): torch.ones((16, 48) if half == "A" else (width, 16))
        for layer in range(4)
        for kind, width in widths.items()
        for half in "AB"
    }


def on_disk(module: str) -> dict[str, str]:
    """A device map of the tiny Llama with one module offloaded."""
    layers = [f"model.layers.{layer}" for layer in range(4)]
    places = dict.fromkeys(["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return {**places, module: "disk"}


def merged_embeds(lalm: LALM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters the first block."""
    entering = []
    block = lalm.module.model.language_model.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        lalm.module(**inputs)
    handle.remove()
    return entering[0]


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": lambda module: DynamicCache(config=module.config.text_config)},
        {"past_key_values": lambda module: DynamicCache()},
    ],
    ids=["recomputed", "static", "fresh cache", "fresh lazy cache"],
)
def test_every_cache_generates_the_originals_tokens(lalm: LALM, inputs: dict[str, torch.Tensor], how: dict) -> None:
    given = {name: value(lalm.module) if callable(value) else value for name, value in how.items()}
    made = lalm.module.generate(**inputs, **given, max_new_tokens=NEW, do_sample=False)
    wanted = golden("desta2", "committed").get("audio16k", "gen.new_tokens")
    assert torch.equal(made[:, -NEW:], wanted)


def test_a_prompt_with_clips_is_not_read_in_chunks(lalm: LALM, inputs: dict[str, torch.Tensor]) -> None:
    """transformers gives later chunks no features: the clips would be lost without a sound."""
    with pytest.raises(ValueError, match="read at once: leave prefill_chunk_size unset"):
        lalm.module.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=40)
    text = lalm.prompt(question="Hello?").inputs
    whole, chunked = (
        lalm.module.generate(**text, max_new_tokens=4, do_sample=False, **kwargs)
        for kwargs in ({}, {"prefill_chunk_size": 5})
    )
    assert torch.equal(whole, chunked)


def test_merged_embeddings_stand_for_ids_and_clips(lalm: LALM, inputs: dict[str, torch.Tensor]) -> None:
    embeds, mask = merged_embeds(lalm, inputs), inputs["attention_mask"]
    with torch.no_grad():
        wanted = lalm.module(**inputs).logits
        found = lalm.module(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(wanted, found)
    made = lalm.module.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made, golden("desta2", "committed").get("audio16k", "gen.new_tokens"))
    with pytest.raises(ValueError, match="no place for them is marked"):
        lalm.module(inputs_embeds=embeds, input_features=inputs["input_features"])


def test_gradients_reach_the_waveforms_features(lalm: LALM, inputs: dict[str, torch.Tensor]) -> None:
    features = inputs["input_features"].clone().requires_grad_()
    is_word = inputs["input_ids"] != lalm.processor.audio_token_id
    labels = inputs["input_ids"].where(is_word, torch.tensor(-100))
    loss = lalm.module(**{**inputs, "input_features": features}, labels=labels).loss
    loss.backward()
    assert float(features.grad.abs().max()) > 0
    assert float(lalm.module.model.multi_modal_projector.layer_weights.grad.abs().max()) > 0
    lalm.module.zero_grad()


def test_eager_attention_reaches_every_part(folder: Path, lalm: LALM, inputs: dict[str, torch.Tensor]) -> None:
    eager = load(folder, attn_implementation="eager").module
    parts = (eager.model.language_model, eager.model.whisper.model.encoder, eager.model.whisper.model.decoder)
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 3
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits, lalm.module(**inputs).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_saved_half_precision_model_stays_one(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    low = load(folder, dtype=dtype)
    low.module.save_pretrained(tmp_path)
    low.processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert low.module.dtype == again.module.dtype == again.dtype == dtype
    ears = (again.module.model.whisper, again.module.model.multi_modal_projector)
    assert {parameter.dtype for part in ears for parameter in part.parameters()} == {torch.float32}
    assert again.bridge().cfg.dtype == dtype
    assert load(tmp_path, dtype=torch.float32).module.dtype == torch.float32


def test_transformers_own_classes_load_what_we_save(
    lalm: LALM, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    lalm.module.save_pretrained(tmp_path)
    lalm.processor.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "proj_out" in name]
    module, processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (type(module), type(processor)) == (DestaForConditionalGeneration, DestaProcessor)
    whisper = module.model.whisper
    assert whisper.proj_out.weight is whisper.model.decoder.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(module(**inputs).logits, lalm.module(**inputs).logits)
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    own, theirs = (
        FAMILY.transcribe(*pair, [clip], truncate=False)
        for pair in ((module, processor), (lalm.module, lalm.processor))
    )
    assert own == theirs != [""]


def test_generation_ends_where_the_llama_ends(lalm: LALM, tmp_path: Path) -> None:
    lalm.module.save_pretrained(tmp_path)
    again = DestaForConditionalGeneration.from_pretrained(tmp_path)
    assert lalm.module.generation_config.eos_token_id == again.generation_config.eos_token_id == [316, 319]


def test_clips_transcribed_together_are_transcribed_as_alone(lalm: LALM) -> None:
    numbers = golden("desta2", "committed")
    clips = [clip_of(numbers, case) for case in CASES]
    together = FAMILY.transcribe(lalm.module, lalm.processor, clips, truncate=False)
    assert together == [FAMILY.transcribe(lalm.module, lalm.processor, [clip], truncate=False)[0] for clip in clips]
    assert len(set(together)) == len(clips)


def test_features_that_do_not_fill_the_window_are_refused(lalm: LALM, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(PromptError, match="full window of 400 mel frames, not 300"):
        lalm.trace({**inputs, "input_features": inputs["input_features"][..., :300]})


def test_space_around_words_is_cut_off_as_the_templates_do(lalm: LALM) -> None:
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    bare, spaced = (
        lalm.prompt(clip, question=f"{space}What?{space}", system=f"{space}Listen.{space}") for space in ("", "\n ")
    )
    assert torch.equal(bare.inputs["input_ids"], spaced.inputs["input_ids"])


def test_the_newer_release_never_takes_the_detour(newer: Path) -> None:
    """Its code resamples straight to 16 kHz, whatever DeSTA2's did."""
    clip = clip_of(golden("desta2", "committed"), "audio44k1_no_system")
    straight, asked = (
        FAMILY.hear(load(newer, original_quirks=quirks).processor, [clip], truncate=False).tensors["input_features"]
        for quirks in (False, True)
    )
    assert torch.equal(straight, asked)


@pytest.mark.parametrize(
    ("fields", "weights", "told"),
    [
        ({}, {"perception.extra": torch.ones(1)}, "unexpected_keys: perception.extra"),
        ({}, low_rank(), "unexpected_keys: llm_model"),
        ({"use_lora": True}, {}, "missing_keys: llm_model"),
        ({"use_lora": True}, {**low_rank(), LORA.format(0, "o_proj", "A"): torch.ones(16, 48)}, "unexpected.*o_proj"),
        (
            {"use_lora": True},
            {**low_rank(), LORA.format(3, "k_proj", "B"): torch.ones(17, 16)},
            "mismatched.*3.*k_proj",
        ),
    ],
    ids=["unknown", "not announced", "announced, not there", "of another module", "of another shape"],
)
def test_weights_that_do_not_fit_the_newer_release_are_refused(
    newer: Path, fields: dict, weights: dict[str, torch.Tensor], told: str
) -> None:
    with pytest.raises(LoadError, match=told):
        load(changed(newer, fields, weights))


def test_a_newer_release_without_low_rank_changes_loads(newer: Path) -> None:
    assert load(newer).processor.release == "desta2.5"


def test_the_newer_release_tokenises_a_transcript_on_its_own(newer: Path) -> None:
    """Llama 3 has a token for " <": it must not join the words to the tag behind them."""
    lalm = load(newer)
    lalm.tokenizer.add_tokens([" <"])
    batch = lalm.prompt(clip_of(golden("desta2", "committed"), "audio16k"), transcript="a ")
    said = lalm.tokenizer("a ", add_special_tokens=False)["input_ids"]
    assert batch.inputs["input_ids"][0, batch.at("transcript").cols].tolist() == said


def test_a_connector_of_another_kind_is_refused(newer: Path) -> None:
    with pytest.raises(ValueError, match="of the kind 'qformer_2'; only 'qformer_1' was published"):
        load(changed(newer, {"connector_mode": "qformer_2"}, {}))


@pytest.mark.parametrize("offloaded", ["model.embed_tokens", "model.layers.3", "lm_head"])
def test_an_offloaded_llama_gives_the_same_logits(
    folder: Path, lalm: LALM, inputs: dict[str, torch.Tensor], offloaded: str
) -> None:
    placed = FAMILY.load(str(folder), None, device_map=on_disk(offloaded)).module
    assert placed.hf_device_map[offloaded.replace("model.", "model.language_model.")] == "disk"
    with torch.no_grad():
        assert torch.equal(placed(**inputs).logits, lalm.module(**inputs).logits)


def test_low_rank_changes_are_not_lost_on_offloaded_weights(newer: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.3.*choose another device_map"):
        load(changed(newer, {"use_lora": True}, low_rank()), device_map=on_disk("model.layers.3"))


def test_a_base_model_with_a_missing_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llama", tmp_path / "llama")
    weights = load_file(tmp_path / "llama" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "llama" / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "llama_model_id": str(tmp_path / "llama")}))
    shutil.copy(folder / "qformer_connector.pth", tmp_path)
    with pytest.raises(LoadError, match=r"missing_keys: llama: model\.norm\.weight"):
        load(tmp_path)

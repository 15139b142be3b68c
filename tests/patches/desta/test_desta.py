"""DeSTA2 against the numbers of the original code, loaded as it was published: base models and a connector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import SOURCES, Golden, golden
from safetensors.torch import save_file
from transformers import (
    LlamaForCausalLM,
)

from audio_lens_plugin.audio import Clip
from audio_lens_plugin.lalm import LALM
from audio_lens_plugin.loading import LoadError, load
from audio_lens_plugin.patches.desta import FAMILY
from audio_lens_plugin.patches.desta.checkpoint import RENAMED, our_name
from audio_lens_plugin.patches.desta.configuration import published_targets
from audio_lens_plugin.prompts import PromptError
from audio_lens_plugin.spans import Role

CASES = ("audio16k", "audio44k1_no_system", "audio22k_multi_turn")
RATES = {"audio16k": 16_000, "audio44k1_no_system": 44_100, "audio22k_multi_turn": 22_050}
ENCODER, CONNECTOR, HIDDEN, LOGITS = 2e-5, 1e-5, 2e-5, 5e-5


def clip_of(numbers: Golden, case: str) -> Clip:
    told = numbers.cases[case]
    return Clip(numbers.get(case, "waveform").numpy(), RATES[case], case, transcript=told["transcription"])


def inputs_of(lalm: LALM, numbers: Golden, case: str) -> dict[str, torch.Tensor]:
    """The recorded ids with the placeholders put in where the original put its vectors, and the clip's features."""
    ids, place = numbers.get(case, "input_ids"), numbers.cases[case]["audio_position"]
    audio = torch.full((1, 64), lalm.processor.audio_token_id)
    whole = torch.cat([ids[:, :place], audio, ids[:, place:]], dim=1)
    features = FAMILY.hear(lalm.processor, [clip_of(numbers, case)], truncate=False).tensors
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole), **features}


def recorded(lalm: LALM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor that was recorded of the original, under its name there."""
    inner, found = lalm.module.model, {}
    connector, language = inner.multi_modal_projector, inner.language_model

    def keep(name: str, entering: bool = False):
        def hook(module, args, output):
            found[name] = args[0] if entering else output

        return hook

    handles = [inner.whisper.model.encoder.register_forward_hook(keep("encoder"))]
    handles += [connector.qformer.register_forward_hook(keep("qformer"))]
    handles += [layer.register_forward_hook(keep(f"qformer{i}")) for i, layer in enumerate(connector.qformer.layers)]
    handles += [connector.proj.register_forward_hook(keep("connector.weighted_sum", entering=True))]
    handles += [connector.register_forward_hook(keep("connector.out"))]
    handles += [language.layers[0].register_forward_hook(keep("inputs_embeds", entering=True))]
    handles += [layer.register_forward_hook(keep(f"hidden.layer{i}")) for i, layer in enumerate(language.layers)]
    handles += [language.norm.register_forward_hook(keep("hidden.norm"))]
    with torch.no_grad():
        found["logits"] = lalm.module(**inputs).logits
    for handle in handles:
        handle.remove()
    encoder = found.pop("encoder")
    found["whisper.encoder_hidden_states"] = torch.stack([*encoder.hidden_states[:-1], encoder.last_hidden_state])
    found["connector.qformer_out"] = found.pop("qformer")[0]
    layers = torch.stack([found.pop(f"qformer{i}")[0] for i in range(len(connector.qformer.layers))], dim=1)
    found["connector.qformer_layer_out"] = layers.flatten(0, 1)  # target by target
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_tensor(lalm: LALM, case: str, source: str) -> None:
    numbers = golden("desta2", source)
    inputs = inputs_of(lalm, numbers, case)
    found = recorded(lalm, inputs)
    made = lalm.module.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    found["gen.scores"] = torch.stack(made.logits, dim=1)
    best = found["gen.scores"].topk(2).values
    found["gen.margin"] = best[..., 0] - best[..., 1]
    found["input_features"] = inputs["input_features"]
    found["attention_mask"] = inputs["attention_mask"].float()
    clip = clip_of(numbers, case)
    found["audio.librosa_load"] = torch.from_numpy(clip.at_rate(22_050).waveform)
    found["audio.resampled_16k"] = torch.from_numpy(clip.at_rate(22_050).at_rate(16_000).waveform)
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, numbers.get(case, "gen.new_tokens"))
    given = {"input_ids", "gen.new_tokens", "waveform", "tokenizer_attention_mask", "whisper.sequences"}
    assert numbers.keys(case) - given == set(found), "every key is held"
    for key, tensor in found.items():
        kind = key.split(".")[0]
        tolerance = {"whisper": ENCODER, "connector": CONNECTOR, "hidden": HIDDEN, "inputs_embeds": CONNECTOR}
        numbers.check(case, key, tensor, {"audio": 1e-6, "input_features": ENCODER, **tolerance}.get(kind, LOGITS))


@pytest.mark.parametrize("case", ["audio16k", "audio44k1_no_system"])
def test_the_released_prompt_has_the_ids_of_the_original(lalm: LALM, case: str) -> None:
    numbers = golden("desta2", "committed")
    words = {message["role"]: message["content"] for message in numbers.cases[case]["messages"]}
    batch = lalm.prompt(clip_of(numbers, case), question=words["user"], system=words.get("system", ""))
    assert torch.equal(batch.inputs["input_ids"], inputs_of(lalm, numbers, case)["input_ids"])
    assert torch.equal(batch.inputs["input_features"], inputs_of(lalm, numbers, case)["input_features"])
    said = numbers.cases[case]["transcription"]
    tokens = [batch.positions.token_text(0, col) for col in batch.at("transcript").cols.tolist()]
    assert "".join(tokens).strip() == said


def test_the_clean_prompt_writes_what_was_meant(folder: Path) -> None:
    lalm, numbers = load(folder, prompt_style="clean"), golden("desta2", "committed")
    clip = clip_of(numbers, "audio16k")
    batch = lalm.prompt([[clip, clip]], question="Which?")
    text = batch.positions.row_texts[0].text
    vectors = lalm.family.audio_token * 64
    assert text.count("<|begin_of_text|>") == 1
    assert text.count(f"<|start_header_id|>audio<|end_header_id|>\n\n{vectors}{clip.transcript}<|eot_id|>") == 2
    assert len(batch.at("audio[1]")) == 64


def test_the_released_prompt_holds_one_clip(lalm: LALM) -> None:
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    with pytest.raises(PromptError, match='one clip, not 2; load with prompt_style="clean"'):
        lalm.prompt([[clip, clip]])


def test_without_a_clip_no_audio_turn_is_written(lalm: LALM) -> None:
    batch = lalm.prompt(question="Hello?")
    assert "audio<|end_header_id|>" not in batch.positions.row_texts[0].text
    assert not bool((batch.positions.roles == Role.AUDIO).any())


def test_resampling_takes_the_detour_only_when_asked(folder: Path, lalm: LALM) -> None:
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    straight = FAMILY.hear(load(folder).processor, [clip], truncate=False).tensors["input_features"]
    detour = FAMILY.hear(lalm.processor, [clip], truncate=False).tensors["input_features"]
    assert float((straight - detour).abs().max()) > 1e-3


def test_whisper_transcribes_what_was_not_given(lalm: LALM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny decoder's words begin as the original's did; it is asked once per clip."""
    numbers = golden("desta2", "committed")
    clip = clip_of(numbers, "audio16k")
    silent = Clip(clip.waveform, clip.rate, "no words given")
    calls = []
    generate = type(lalm.module.model.whisper).generate
    monkeypatch.setattr(
        type(lalm.module.model.whisper), "generate", lambda *args, **kw: calls.append(1) or generate(*args, **kw)
    )
    for _ in range(2):
        batch = lalm.prompt([silent, silent])
    words = batch.prompts[0].clips[0].transcript
    assert words.startswith(clip.transcript[:10])
    assert batch.prompts[1].clips[0].transcript == words
    assert len(calls) == 1


def test_bfloat16_leaves_ears_and_connector_in_float32(folder: Path) -> None:
    low = load(folder, dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in low.module.named_parameters()}
    single = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert single == {name for name in kinds if name.startswith(("model.whisper", "model.multi_modal_projector"))}
    assert low.dtype == torch.bfloat16
    inputs = low.inputs(low.prompt(clip_of(golden("desta2", "committed"), "audio16k")))
    assert inputs["input_features"].dtype == torch.float32
    assert torch.isfinite(low.module(**inputs).logits).all()


def test_layer_shares_and_query_states_can_be_read(lalm: LALM) -> None:
    batch = lalm.prompt(clip_of(golden("desta2", "committed"), "audio16k"))
    with torch.no_grad(), lalm.trace(batch):
        states = lalm.audio_projector.query_states.output.save()
        shares = lalm.audio_projector.mixture.output.save()
    assert states.shape == (1, 4, 64, 24)
    assert shares.shape == (64, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(64))
    with torch.no_grad():
        _, cache = lalm.bridge().run_with_cache(batch)
    torch.testing.assert_close(cache["audio_projector.query_states.hook_out"], states)
    torch.testing.assert_close(cache["audio_projector.mixture.hook_out"], shares)


def test_what_we_save_is_one_checkpoint(lalm: LALM, tmp_path: Path) -> None:
    lalm.module.save_pretrained(tmp_path)
    lalm.processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.processor.original_quirks is True
    assert load(tmp_path, prompt_style="clean").processor.prompt_style == "clean"
    for name, tensor in lalm.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name
    batch = lalm.prompt(clip_of(golden("desta2", "committed"), "audio16k"))
    assert torch.equal(again.module(**batch.inputs).logits, lalm.module(**batch.inputs).logits)
    assert again.prompt(Clip(batch.prompts[0].clips[0].waveform, 16_000)).prompts[0].clips[0].transcript


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop("layer_weights"), "missing_keys: layer_weights"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected_keys: extra"),
        (lambda weights: weights.update(layer_weights=torch.ones(64, 3)), "mismatched_keys: layer_weights"),
    ],
)
def test_a_connector_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, change, told: str) -> None:
    weights = torch.load(folder / "qformer_connector.pth", weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / "qformer_connector.pth")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(LoadError, match=told):
        load(tmp_path)


# DeSTA2.5-Audio: no numbers of the original exist; what its published code says is checked.


@pytest.fixture(scope="module")
def newer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same parts in DeSTA2.5's layout, with three Q-Former layers and low-rank changes."""
    place = tmp_path_factory.mktemp("desta25")
    config = {"model_type": "desta25", "prompt_size": 64, "qformer_num_hidden_layers": 3, "use_lora": True}
    config |= {"llm_model_id": str(folder / "llama"), "encoder_model_id": str(folder / "whisper")}
    (place / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = torch.load(folder / "qformer_connector.pth", weights_only=True)
    weights |= {
        name.replace("layer.1.", "layer.2."): torch.randn_like(tensor) * 0.2
        for name, tensor in weights.items()
        if "layer.1." in name
    }
    weights = {f"perception.connector.{name}": tensor.contiguous() for name, tensor in weights.items()}
    for kind, width in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16)):
        for layer in range(4):
            stem = f"llm_model.model.layers.{layer}.self_attn.{kind}"
            weights[f"{stem}.lora_A.default.weight"] = torch.randn(16, 48) * 0.1
            weights[f"{stem}.lora_B.default.weight"] = torch.randn(width, 16) * 0.1
    save_file(weights, place / "model.safetensors")
    return place


def test_low_rank_changes_are_added_to_the_weights(folder: Path, newer: Path) -> None:
    from safetensors.torch import load_file

    changed, plain = load(newer).module.model.language_model, LlamaForCausalLM.from_pretrained(folder / "llama").model
    low = load_file(newer / "model.safetensors")
    states = torch.randn(2, 5, 48)
    for layer in range(4):
        for kind in ("q_proj", "k_proj", "v_proj"):
            stem = f"llm_model.model.layers.{layer}.self_attn.{kind}"
            down, up = (low[f"{stem}.lora_{half}.default.weight"] for half in "AB")
            wanted = getattr(plain.layers[layer].self_attn, kind)(states) + states @ down.T @ up.T  # alpha / rank is 1
            found = getattr(changed.layers[layer].self_attn, kind)(states)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_newer_release_reads_layers_one_deeper(newer: Path, lalm: LALM) -> None:
    assert load(newer).module.config.target_layers == [3, 6, 9, 12]
    assert lalm.module.config.target_layers == [2, 5, 8, 11]
    assert len(load(newer).module.model.multi_modal_projector.qformer.layers) == 3


@pytest.mark.parametrize(("whisper", "layers"), [("tiny", 4), ("small", 12), ("medium", 24), ("large-v3", 32)])
def test_targets_lie_evenly_and_the_newer_ones_one_deeper(whisper: str, layers: int) -> None:
    older, newer = published_targets("desta2", layers), published_targets("desta2.5", layers)
    step = older[1] - older[0]
    assert older == tuple(range(step - 1, layers, step))
    assert newer[-1] == layers
    assert {target - 1 for target in newer} <= set(older)


@pytest.mark.parametrize(("release", "layers"), [("desta3", 32), ("desta2", 6)])
def test_a_release_that_was_never_published_has_no_targets(release: str, layers: int) -> None:
    with pytest.raises(ValueError, match="give target_layers"):
        published_targets(release, layers)


def test_the_last_target_of_the_newer_release_is_not_normed(newer: Path) -> None:
    lalm = load(newer)
    batch = lalm.prompt(clip_of(golden("desta2", "committed"), "audio16k"))
    with torch.no_grad():
        output = lalm.module.model.whisper.model.encoder(batch.inputs["input_features"])
    assert not torch.allclose(output.hidden_states[12], output.last_hidden_state)
    normed = lalm.module.model.whisper.model.encoder.layer_norm(output.hidden_states[12])
    torch.testing.assert_close(normed, output.last_hidden_state)


def test_the_newer_prompt(newer: Path) -> None:
    lalm = load(newer)
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    batch = lalm.prompt([[clip, clip], [clip]], question="Which is louder?", answer="The first")
    vectors = lalm.family.audio_token * 64
    heard = f"<start_audio>{vectors}{clip.transcript}<end_audio>"
    assert batch.positions.row_texts[0].text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nFocus on the audio clips and instructions."
        f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{heard}{heard}\nWhich is louder?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThe first"
    )
    said = lalm.tokenizer(clip.transcript, add_special_tokens=False)["input_ids"]
    chosen = batch.at("transcript").row(1)
    assert batch.inputs["input_ids"][1, chosen].tolist() == said  # apart: nothing melts into the tag behind it
    assert not torch.equal(lalm.module(**batch.inputs).logits[0, -1], lalm.module(**batch.inputs).logits[1, -1])


def test_the_newer_release_strips_what_whisper_says(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lalm = load(newer)
    asked: dict = {}
    monkeypatch.setattr(
        type(lalm.module.model.whisper),
        "generate",
        lambda self, x, **kw: asked.update(kw) or torch.tensor([[220, 70, 220]]),
    )
    clip = clip_of(golden("desta2", "committed"), "audio16k")
    (text,) = FAMILY.transcribe(lalm.module, lalm.processor, [clip], truncate=False)
    assert text == text.strip() != ""
    assert asked == {"max_new_tokens": 128}


def test_names_of_the_original_become_ours() -> None:
    assert our_name("qformer.layer.1.attention.self.query.weight") == "qformer.layers.1.self_attn.q_proj.weight"
    assert our_name("qformer.layer.0.crossattention.output.LayerNorm.bias") == "qformer.layers.0.cross_attn.norm.bias"
    assert our_name("qformer.layer.0.output.dense.bias") == "qformer.layers.0.fc2.bias"
    names = [name for name in golden("desta2", "committed").weights if ".connector." in name]
    assert all(any(old in name for name in names) for old in RENAMED)

"""Look inside large audio-language models, with TransformerLens's names on nnsight's traces.

    import audio_lens_plugin as alp

    lalm = alp.load("toy/qwen2-audio")
    batch = lalm.prompt("dog.wav", answer="The sound file's animal is", attribute="animal")
    print(batch)                                # every position, labelled
    lalm.answer(batch, ["dog", "cat", "cow"])   # what it says
    alp.logit_lens(lalm, batch, ["dog", "cat", "cow"], positions=["last", "attribute"]).plot()

Public names load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import wrapt

__version__ = "0.1.0"

_HOMES = {
    "AudioError": "audio",
    "Clip": "audio",
    "as_clip": "audio",
    "LabelError": "labels",
    "Labels": "labels",
    "LALM": "lalm",
    "LoadError": "loading",
    "families": "loading",
    "load": "loading",
    "toys": "loading",
    "Prompt": "prompts",
    "PromptBatch": "prompts",
    "PromptError": "prompts",
    "Sample": "prompts",
    "SpanError": "spans",
    "TRACKS": "tracks",
    "PromptForm": "tracks",
    "Track": "tracks",
    "sakura": "datasets",
    "table": "datasets",
    "sakura_tracks": "datasets",
    "toy_clips": "datasets",
    "toy_tracks": "datasets",
    "QuestionSet": "multiple_choice",
    "questions": "multiple_choice",
    "sakura_questions": "multiple_choice",
    "sakura_whole": "multiple_choice",
    "HeadsResult": "recipes.listening_heads",
    "KnockoutResult": "recipes.attention_knockout",
    "attention_knockout": "recipes.attention_knockout",
    "knocked_out": "recipes.cuts",
    "knockout_table": "recipes.attention_knockout",
    "listening_heads": "recipes.listening_heads",
    "AttributionResult": "recipes.activation_patching",
    "PatchResult": "recipes.activation_patching",
    "activation_patching": "recipes.activation_patching",
    "attribution_patching": "recipes.activation_patching",
    "EnhanceResult": "recipes.enhancement",
    "Enhancement": "recipes.enhancement",
    "enhance": "recipes.enhancement",
    "enhance_grid": "recipes.enhancement",
    "enhance_sweep": "recipes.enhancement",
    "enhance_tracks": "recipes.enhancement",
    "enhanced": "recipes.enhancement",
    "held_out_table": "recipes.enhancement",
    "judged": "recipes.enhancement",
    "AnswersResult": "recipes.free_answers",
    "free_answers": "recipes.free_answers",
    "Direction": "recipes.steering",
    "SteeringResult": "recipes.steering",
    "audio_direction": "recipes.steering",
    "steered": "recipes.steering",
    "steering_sweep": "recipes.steering",
    "LensResult": "recipes.logit_lens",
    "logit_lens": "recipes.logit_lens",
    "AlignmentError": "recipes.pairs",
    "Pair": "recipes.pairs",
    "pairs_from": "recipes.pairs",
}

__all__ = ["__version__", *_HOMES]


def _boot_with_our_families(boot: Any, _: Any, args: Any, kwargs: Any) -> Any:
    import_module(f"{__name__}.loading").join_transformer_lens()
    return boot(*args, **kwargs)


@wrapt.when_imported("transformer_lens.model_bridge.sources.transformers")
def _join_transformer_lens(_: Any) -> None:
    """TransformerLens, whenever it is imported, boots our architectures, too."""
    wrapt.wrap_function_wrapper(
        "transformer_lens.model_bridge.bridge", "TransformerBridge.boot_transformers", _boot_with_our_families
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""``audio-lens run``: experiments on a set of clips, from loading to the report.

A command here says what is particular about its experiment. What all have in common is said once: their options
(`Setup`), and how an experiment is run, kept, and told (`_run`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from audio_lens_plugin.datasets import ClipSet
    from audio_lens_plugin.lalm import LALM
    from audio_lens_plugin.report import Section

run_app = typer.Typer(help="Run an experiment on a set of clips.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)

Data = Annotated[str, typer.Option(help="sakura:FOLDER/Animal, or table:FILE (csv, tsv, jsonl, parquet).")]
Out = Annotated[Path, typer.Option(help="Folder for results, figures and finished batches.")]
Model = Annotated[str, typer.Option("--model", help="A repo id, a folder, or a toy such as toy/qwen2-audio.")]
Form = Annotated[str, typer.Option(help="Prompt form, for example open+is, reversed+is+question.")]
Label = Annotated[str, typer.Option(help="Label column of a table.")]
TrackName = Annotated[
    str | None, typer.Option(help="Track of a table: Animal, Emotion, Gender, Language, or a JSON file.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Clips per forward pass.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if left out.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto (spread over devices).")]
Truncate = Annotated[bool, typer.Option(help="Cut clips that are longer than the model's window.")]
DEFAULT_MODEL = "toy/qwen2-audio"

Positions = Annotated[str, typer.Option(help="Names of positions, with commas.")]
Layers = Annotated[str | None, typer.Option(help="Layers from 0, with commas; all if left out.")]
Queries = Annotated[str, typer.Option(help="Who reads: a name of positions.")]
Keys = Annotated[str, typer.Option(help="Who is read: a name of positions.")]


@dataclass(frozen=True)
class Setup:
    """The options that every experiment has."""

    data: Data
    out: Out
    model: Model = DEFAULT_MODEL
    form: Form = "open+is"
    label: Label = "label"
    track: TrackName = None
    batch_size: BatchSize = 8
    dtype: Dtype = None
    device: Device = None
    truncate: Truncate = False


@dataclass(frozen=True)
class Found:
    """What an experiment leaves: results by the name of their folder, tables and figures by file name, and words."""

    results: Mapping[str, Any]
    tables: Mapping[str, DataFrame]
    figures: Mapping[str, Figure]
    sections: list[Section]
    summary: str


Experiment = Callable[..., Found]
"""Takes the model, the clips, and as keywords what recipes have in common; returns what it found."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command of `run_app`: the options of `Setup` before the function's own, which follow its ``setup``."""
    common = inspect.signature(Setup, eval_str=True).parameters
    _, *own = inspect.signature(function, eval_str=True).parameters.values()

    @wraps(function)
    def command(**options: Any) -> None:
        setup = Setup(**{name: options.pop(name) for name in common})
        function(setup, **options)

    asked = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*common.values(), *own)]
    del command.__wrapped__  # typer would look for annotations there
    command.__annotations__ = {one.name: one.annotation for one in asked}
    command.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    run_app.command()(command)
    return command


@_command
def lens(
    setup: Setup,
    positions: Positions = "last,attribute",
    top_k: Annotated[int, typer.Option(help="Also keep this many best words per layer and position.")] = 0,
    whole: Annotated[bool, typer.Option(help="Read whole labels, not first tokens (with --positions last).")] = False,
) -> None:
    """Logit lens of all layers: information score, success and failure curves, critical layer."""
    names = _names(positions)

    def experiment(lalm: LALM, clips: ClipSet, **common: Any) -> Found:
        from audio_lens_plugin.recipes.logit_lens import logit_lens
        from audio_lens_plugin.report import lens_section, right_and_wrong

        samples = clips.samples(setup.form)
        result = logit_lens(lalm, samples, clips.track.labels, names, top_k=top_k, whole=whole, **common)
        examples = right_and_wrong(result, samples) if "audio" in names else []
        return Found(
            results={"logit_lens": result},
            tables={"information": result.information(), "curves": result.curves()},
            figures={"logit_lens": result.plot()},
            sections=[lens_section(result, f"{clips.track.name}: the logit lens", examples)],
            summary=f"accuracy {result.accuracy:.3f} on {len(result.samples)} clips; "
            f"critical layer: {result.critical_layer()}",
        )

    _run(setup, "Logit lens", experiment)


@_command
def patch(
    setup: Setup,
    corrupted: Annotated[
        str,
        typer.Option(help="other (a clip of another label), silence, noise, or embeddings (noise on what is heard)."),
    ] = "silence",
    site: Annotated[str, typer.Option(help="TransformerLens's names, with commas.")] = "hook_resid_pre",
    positions: Annotated[
        str, typer.Option(help="Names of positions, with commas, or every: each position alone.")
    ] = "audio,attribute,answer,last",
    direction: Annotated[str, typer.Option(help="denoise the corrupted run, or noise the clean one.")] = "denoise",
    how: Annotated[str, typer.Option(help="Where lengths differ: exact (an error), pool, crop or resample.")] = "exact",
    layers: Layers = None,
) -> None:
    """Activation patching: what of the clean run brings the answer back, by layer and position."""
    _check_one_of("--direction", direction, ("denoise", "noise"))
    chosen, sites, names = _layers(layers), _names(site), _names(positions)

    def experiment(lalm: LALM, clips: ClipSet, **common: Any) -> Found:
        from audio_lens_plugin.causal_sections import patch_section
        from audio_lens_plugin.recipes.activation_patching import activation_patching
        from audio_lens_plugin.recipes.pairs import pairs_from

        pairs = pairs_from(clips.samples(setup.form), corrupted)
        settings = {"layers": chosen, "direction": direction, "how": how, **common}
        result = activation_patching(lalm, pairs, clips.track.labels, sites, names, **settings)
        table = result.table()
        section = patch_section(result, f"{clips.track.name}: activation patching")
        return Found(
            results={"activation_patching": result},
            tables={"recovered": table},
            figures={one.replace(".", "_"): result.plot(site=one) for one in table["site"].unique()},
            sections=[section],
            summary=section.text[0],
        )

    _run(setup, "Activation patching", experiment)


@_command
def knockout(
    setup: Setup,
    queries: Annotated[str, typer.Option(help="Who reads: names of positions, with commas.")] = "last",
    keys: Annotated[str, typer.Option(help="Who is read: names of positions, with commas.")] = "audio",
    window: Annotated[int, typer.Option(min=1, help="Layers that are cut together.")] = 3,
    strength: Annotated[float, typer.Option(help="Factor on the attention weights of the keys; 0 cuts.")] = 0.0,
    how: Annotated[str, typer.Option(help="mask (renormalised), zero (after the softmax) or spread.")] = "mask",
    table: Annotated[
        bool, typer.Option(help="Also last, attribute, question, text x audio, transcript, attribute.")
    ] = False,
) -> None:
    """Attention knockout: who must read the audio, and in which layers."""
    _check_one_of("--how", how, ("mask", "zero", "spread"))

    def experiment(lalm: LALM, clips: ClipSet, **common: Any) -> Found:
        from audio_lens_plugin.causal_sections import knockout_section
        from audio_lens_plugin.recipes.attention_knockout import attention_knockout, knockout_table

        samples, labels = clips.samples(setup.form), clips.track.labels
        cut = {"window": window, "strength": strength, "how": how, **common}
        results = {
            "attention_knockout": attention_knockout(lalm, samples, labels, _names(queries), _names(keys), **cut)
        }
        titles = {"attention_knockout": "attention knockout", "knockout_table": "who needs to read whom"}
        if table:
            results["knockout_table"] = knockout_table(lalm, samples, labels, window=window, **common)
        sections = [knockout_section(result, f"{clips.track.name}: {titles[name]}") for name, result in results.items()]
        return Found(
            results=results,
            tables={name: result.effects() for name, result in results.items()},
            figures={name: result.plot() for name, result in results.items()},
            sections=sections,
            summary=sections[0].text[0],
        )

    _run(setup, "Attention knockout", experiment, attention=None if how == "mask" else "eager")


@_command
def heads(setup: Setup, queries: Queries = "last", keys: Keys = "audio") -> None:
    """Heads that listen: how much each looks at the audio, and what its loss costs. Runs with eager attention."""

    def experiment(lalm: LALM, clips: ClipSet, **common: Any) -> Found:
        from audio_lens_plugin.causal_sections import heads_section
        from audio_lens_plugin.recipes.listening_heads import MEASURES, listening_heads

        samples = clips.samples(setup.form)
        result = listening_heads(lalm, samples, clips.track.labels, queries=queries, keys=keys, **common)
        section = heads_section(result, f"{clips.track.name}: heads that listen")
        return Found(
            results={"listening_heads": result},
            tables={"heads": result.ranked()},
            figures={f"heads_{measure}": result.plot(measure) for measure in MEASURES},
            sections=[section],
            summary=section.text[0],
        )

    _run(setup, "Listening heads", experiment, attention="eager")


@_command
def enhance(
    setup: Setup,
    position: Annotated[str, typer.Option(help="Names of positions that are tried, with commas.")] = "last",
    choose_by: Annotated[
        str, typer.Option(help="accuracy, or information: the source with the best score.")
    ] = "accuracy",
    how: Annotated[str, typer.Option(help="add, average or matched (norms).")] = "add",
    coefficients: Annotated[str, typer.Option(help="Numbers, with commas.")] = "0.5,1,2",
) -> None:
    """Enhancement: add an early layer to a late one; chosen on half of the clips, judged on the other half."""
    _check_one_of("--choose-by", choose_by, ("accuracy", "information"))
    _check_one_of("--how", how, ("add", "average", "matched"))
    numbers = _numbers("--coefficients", coefficients, float)

    def experiment(lalm: LALM, clips: ClipSet, **common: Any) -> Found:
        from audio_lens_plugin.causal_sections import enhance_section
        from audio_lens_plugin.recipes.enhancement import enhance_sweep

        settings: dict[str, Any] = {
            "positions": _names(position),
            "choose_by": choose_by,
            "how": how,
            "coefficients": numbers,
        }
        result = enhance_sweep(lalm, clips.samples(setup.form), clips.track.labels, **settings, **common)
        section = enhance_section(result, f"{clips.track.name}: enhancement")
        return Found(
            results={"enhancement": result},
            tables={"held_out": result.held_out(), "development": result.development()},
            figures={"held_out": result.plot_held_out(), "development": result.plot()},
            sections=[section],
            summary=section.text[0],
        )

    _run(setup, "Enhancement", experiment)


def _run(setup: Setup, title: str, experiment: Experiment, attention: str | None = None) -> None:
    """Load, run, keep, report."""
    import matplotlib.pyplot as plt

    from audio_lens_plugin.loading import load
    from audio_lens_plugin.recipes.figure_style import save_figure
    from audio_lens_plugin.report import subtitle_of, write_report

    clips = _clip_set(setup.data, setup.label, setup.track)
    clips.samples(setup.form)  # a form that does not exist is told before the model is loaded
    lalm = load(setup.model, dtype=setup.dtype, device_map=setup.device, attn_implementation=attention)
    common = {"form": setup.form, "truncate": setup.truncate, "batch_size": setup.batch_size, "progress": True}
    with _telling_how_to_go_on(setup.out / "parts"):
        found = experiment(lalm, clips, folder=setup.out / "parts", **common)
        for name, result in found.results.items():
            result.save(setup.out / name)
        for name, table in found.tables.items():
            table.to_csv(setup.out / f"{name}.csv", index=False)
        for name, figure in found.figures.items():
            save_figure(figure, setup.out / f"{name}.png", "png")
            save_figure(figure, setup.out / f"{name}.svg", "svg")
            plt.close(figure)
        (first, *_) = found.results.values()
        report = write_report(
            setup.out / "report.html", f"{title} of {setup.model}", subtitle_of(first), found.sections
        )
    console.print(found.summary, soft_wrap=True, markup=False, highlight=False)
    print(report)


@contextmanager
def _telling_how_to_go_on(parts: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped; finished batches are in {parts}: the same command goes on from there", soft_wrap=True)
        raise


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _layers(text: str | None) -> list[int] | None:
    return None if text is None else _numbers("--layers", text, int)


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(piece) for piece in _names(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} takes {what} with commas between them, not {text!r}.") from None


def _check_one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{option} {given!r} is none of: {', '.join(known)}.")


def _clip_set(data: str, label: str, track: str | None) -> Any:
    from audio_lens_plugin.datasets import DatasetError, sakura, table

    kind, _, where = data.partition(":")
    if kind == "sakura" and where:
        return sakura(where)
    if kind == "table" and where:
        if track is None:
            raise DatasetError("a table needs --track: one of SAKURA's four, or a JSON file that describes yours.")
        return table(where, label, _track(track))
    raise DatasetError(f"--data {data!r} is neither sakura:FOLDER/TRACK nor table:FILE.")


def _track(track: str) -> Any:
    import json

    from audio_lens_plugin.tracks import Track

    if not track.endswith(".json"):
        return track
    fields = json.loads(Path(track).read_text(encoding="utf-8"))
    return Track(**{**fields, "labels": tuple(fields["labels"])})

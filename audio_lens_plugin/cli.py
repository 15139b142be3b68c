"""The command line: ``audio-lens``. Every command is a few calls that a script could make, too.

Heavy imports stand inside the commands, so that ``audio-lens --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="audio-lens",
    help="Look inside large audio-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
run_app = typer.Typer(help="Run an experiment on a set of clips.", no_args_is_help=True)
app.add_typer(run_app, name="run")
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", help="A repo id, a folder, or a toy such as toy/qwen2-audio.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if left out.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto (spread over devices).")]
DEFAULT_MODEL = "toy/qwen2-audio"


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False) -> None:
    """Look inside large audio-language models."""


@app.command()
def demo(
    model: Annotated[str | None, typer.Option("--model", help="One toy; all of them side by side if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and its tables.")] = Path("out/demo"),
) -> None:
    """Run the logit lens on toy models and the clips that ship with them, and write a report."""
    import torch

    from audio_lens_plugin.demo import run_demo
    from audio_lens_plugin.loading import toys

    torch.set_num_threads(1)  # on models this small, more threads only wait for each other
    print(run_demo([model] if model else list(toys()), out, console))


@app.command()
def models() -> None:
    """List model families, their checkpoints, and what is verified of each."""
    from audio_lens_plugin.loading import families, toys

    table = Table(show_lines=True)
    for column in ("family", "load(...)", "verified"):
        table.add_column(column, overflow="fold")
    for family in families().values():
        table.add_row(family.name, "\n".join(family.repo_ids), family.verified)
    table.add_row("toys (a toy: no speech model)", "\n".join(toys()), "held-out accuracies in each toy's README.md")
    console.print(table)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A repo id, a folder, or a toy such as toy/qwen2-audio.")],
    clips: Annotated[
        list[Path] | None, typer.Argument(help="Two audio files of yours; else two made-up sounds.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None,
) -> None:
    """Check on this machine that a model does what every experiment takes for granted; exit code 1 if not."""
    from audio_lens_plugin.loading import load

    result = load(model, dtype=dtype, device_map=device).check(clips)
    if json is not None:
        json.write_text(result.to_json(), encoding="utf-8")
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def show(
    clip: Annotated[Path, typer.Argument(help="An audio file.")],
    model: Model = DEFAULT_MODEL,
    question: Annotated[str | None, typer.Option(help="The user's words.")] = None,
    answer: Annotated[str | None, typer.Option(help="The assistant's turn, left open.")] = None,
    truncate: Annotated[bool, typer.Option(help="Cut a clip that is longer than the model's window.")] = False,
) -> None:
    """Show a prompt with every position labelled: role, seconds, text."""
    from audio_lens_plugin.loading import load

    batch = load(model).prompt(clip, question=question, answer=answer, truncate=truncate)
    console.print(str(batch), markup=False, highlight=False, soft_wrap=True)


@run_app.command()
def lens(
    data: Annotated[str, typer.Option(help="sakura:FOLDER/Animal, or table:FILE (csv, tsv, jsonl, parquet).")],
    out: Annotated[Path, typer.Option(help="Folder for results, figures and finished batches.")],
    model: Model = DEFAULT_MODEL,
    form: Annotated[str, typer.Option(help="Prompt form, for example open+is, reversed+is+question.")] = "open+is",
    positions: Annotated[str, typer.Option(help="Names of positions, with commas.")] = "last,attribute",
    label: Annotated[str, typer.Option(help="Label column of a table.")] = "label",
    track: Annotated[
        str | None, typer.Option(help="Track of a table: Animal, Emotion, Gender, Language, or a JSON file.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Also keep this many best words per layer and position.")] = 0,
    whole: Annotated[bool, typer.Option(help="Read whole labels, not first tokens (with --positions last).")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips per forward pass.")] = 8,
    dtype: Dtype = None,
    device: Device = None,
    truncate: Annotated[bool, typer.Option(help="Cut clips that are longer than the model's window.")] = False,
) -> None:
    """Logit lens of all layers: information score, success and failure curves, critical layer."""
    from audio_lens_plugin.loading import load
    from audio_lens_plugin.recipes.logit_lens import logit_lens
    from audio_lens_plugin.report import lens_section, right_and_wrong, subtitle_of, write_report

    clips = _clip_set(data, label, track)
    lalm = load(model, dtype=dtype, device_map=device)
    names = [name.strip() for name in positions.split(",") if name.strip()]
    with _telling_how_to_go_on(out / "parts"):
        result = logit_lens(
            lalm,
            clips.samples(form),
            clips.track.labels,
            names,
            top_k=top_k,
            whole=whole,
            form=form,
            truncate=truncate,
            batch_size=batch_size,
            folder=out / "parts",
            progress=True,
        )
        result.save(out / "logit_lens")
        result.information().to_csv(out / "information.csv", index=False)
        result.curves().to_csv(out / "curves.csv", index=False)
        figure = result.plot()
        for kind in ("png", "svg"):
            figure.savefig(out / f"logit_lens.{kind}", dpi=160)
        examples = right_and_wrong(result, clips.samples(form)) if "audio" in names else []
        section = lens_section(result, f"{clips.track.name}: the logit lens", examples)
        report = write_report(out / "report.html", f"Logit lens of {model}", subtitle_of(result), [section])
    critical = result.critical_layer()
    summary = f"accuracy {result.accuracy:.3f} on {len(result.samples)} clips; critical layer: {critical}"
    console.print(summary, soft_wrap=True)
    print(report)


@contextmanager
def _telling_how_to_go_on(parts: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped; finished batches are in {parts}: the same command goes on from there", soft_wrap=True)
        raise


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


def main() -> None:
    """Entry point: errors are one line and exit code 1; a traceback only with ``--debug``."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        errors.print(f"audio-lens: {text}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

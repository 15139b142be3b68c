"""The command line: ``audio-lens``. Every command is a few calls that a script could make, too.

Heavy imports stand inside the commands, so that ``audio-lens --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from audio_lens_plugin import paper_cli
from audio_lens_plugin.run_cli import DEFAULT_MODEL, Device, Dtype, Model, errors, run_app

app = typer.Typer(
    name="audio-lens",
    help="Look inside large audio-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(run_app, name="run")
for command in (paper_cli.paper, paper_cli.merge, paper_cli.compare):
    app.command()(command)
console = Console()


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

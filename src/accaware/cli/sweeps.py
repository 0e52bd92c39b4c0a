"""`accaware sweep` and `accaware report`: many runs, and what they show."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accaware.cli import app
from accaware.cli.jobs import _stated, _values, train

_Argument, _Option = typer.Argument, typer.Option
SWEEP = "Sweep"


def _with_options_of(command: Callable[..., Any], *but: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The parameters of a command that take the place of **options."""

    def derive(function: Callable[..., Any]) -> Callable[..., Any]:
        own, theirs = (inspect.signature(f, eval_str=True).parameters for f in (function, command))
        extra = [p for name, p in theirs.items() if name not in (*own, *but)]
        parameters = [p for p in (*own.values(), *extra) if p.kind is not p.VAR_KEYWORD]
        keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        function.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in keywords}
        return function

    return derive


@app.command()
@_with_options_of(train, "resume")
def sweep(
    context: typer.Context,
    out: Annotated[str, _Option(help="Folder of the sweep, with one run folder per point.", rich_help_panel=SWEEP)],
    grid: Annotated[
        list[str], _Option(help="KEY=V1,V2 or KEY=LO..HI: a setting and all its values.", rich_help_panel=SWEEP)
    ],
    recipe: Annotated[Path | None, _Argument(help="A YAML file of settings.", show_default=False)] = None,
    address: Annotated[
        str | None, _Option(help="Of a Ray cluster; auto finds it. [default: this machine]", rich_help_panel=SWEEP)
    ] = None,
    workers: Annotated[
        int | None,
        _Option(help="Runs at a time, which share the cores. [default: one per core]", min=1, rich_help_panel=SWEEP),
    ] = None,
    gpus_per_run: Annotated[
        float | None,
        _Option(help="GPUs of each run, such as 0.25. [default: 1 where there are any]", min=0, rich_help_panel=SWEEP),
    ] = None,
    retries: Annotated[
        int, _Option(help="How often a point that fails is tried again.", min=0, rich_help_panel=SWEEP)
    ] = 1,
    **options: Any,
) -> int:
    """Train every point of a grid. Killed, the same command goes on. Exit code 0: all are done; 1: some failed.

    Options of `train` apply to all points; they win over the recipe, and the grid wins over them.
    """
    from accaware.experiments.grid import parse, points
    from accaware.experiments.settings import refuse_unread

    values = parse(grid)
    todo = points(values, {name: value for name, value in _values(context).items() if name in options})
    refuse_unread([*values, *(name for name in _stated(context) if name in options)], list(todo.values()))
    from rich.console import Console

    from accaware.experiments.sweep import sweep as run

    failures = run(
        todo, Path(out), Console(), address=address, workers=workers, gpus_per_run=gpus_per_run, retries=retries
    )
    for name, why in failures.items():
        print(f"accaware: {name} failed: {' '.join(why.split())}", file=sys.stderr)
    return 1 if failures else 0


@app.command()
def report(
    runs: Annotated[list[str], _Argument(help="Folders of sweeps or runs, and collected .json.", show_default=False)],
    out: Annotated[
        list[str] | None,
        _Option(
            "--out", "-o", help="What to write, by its suffix: .html, .png, .svg, .csv, or .json, all runs collected."
        ),
    ] = None,
    dark: Annotated[bool, _Option("--dark", help="Draw .png and .svg for dark pages.")] = False,
) -> None:
    """Draw accuracy against accumulator width, and set the papers' tables beside it."""
    from accaware.experiments.curves import groups
    from accaware.experiments.report import html, text
    from accaware.experiments.results import as_csv, collected, read_runs
    from accaware.files import write_whole

    files = [Path(name) for name in out or []]
    if wrong := [file for file in files if file.suffix not in (".html", ".png", ".svg", ".csv", ".json")]:
        raise ValueError(f"{wrong[0]}: the suffix must be .html, .png, .svg, .csv or .json")
    found = read_runs(map(Path, runs))
    drawn = groups(found)
    print(text(drawn), end="")
    for file in files:
        if file.suffix in (".png", ".svg"):
            from accaware.experiments.figures import draw

            write_whole(file, draw(drawn, file.suffix[1:], dark))
        elif file.suffix == ".html":
            write_whole(file, html(drawn, f"accaware report: {' '.join(runs)}"))
        else:
            write_whole(file, as_csv(found) if file.suffix == ".csv" else collected(found))

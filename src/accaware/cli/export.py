"""`accaware export`: a run leaves as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accaware.cli import app


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The folder of a run.", show_default=False)],
    out: Annotated[str, typer.Option("--out", "-o", help="The ONNX file to write.", show_default=False)],
    dialect: Annotated[str, typer.Option(help="qdq, qcdq, qonnx or qoperator.")] = "qdq",
) -> int:
    """Write the integer network as an ONNX file that carries its request and its certificate. Exit code 0: proven."""
    from accaware.experiments.job import load_run, sample_input
    from accaware.exporter.write import export as write

    certificate = write(load_run(Path(run)), out, dialect, sample_input(Path(run)))
    print(certificate.table(), end="")
    print(f"{out}: written in {dialect}")
    return 0 if certificate.holds else 1

"""The command `toast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.files.atomic import try_file


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    pictures: Annotated[
        int, typer.Option(min=0, help="Held-out pictures to show; 0 opens neither model nor data.")
    ] = 8,
) -> None:
    """Write a run as one HTML page: what was trained, results, attention maps, and how to load it."""
    from toast.training.run_folder import refuse_no_run

    refuse_no_run(run)
    try_file(out, "out")
    from toast.report.writing import write_report

    page = write_report(run, out, pictures=pictures)
    typer.echo(f"{page}, {page.stat().st_size / 1e6:.2f} MB")

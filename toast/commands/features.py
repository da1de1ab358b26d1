"""The command `toast features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.commands.configuration import Overrides


def features(
    config: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run's folder, or a configuration.")],
    out: Annotated[Path, typer.Option(help="The file: .safetensors or .parquet.")],
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option(help="train, validation, test, or one of evaluation.splits.")
    ] = "train",
    what: Annotated[
        str,
        typer.Option(help="pooled: what the head reads; class: the class token; selected: w · h of TOAST."),
    ] = "pooled",
) -> None:
    """Write a model's features with labels and names, for other tools."""
    from toast.commands.processes import say
    from toast.training.feature_reading import write_split

    write_split(config, out, overrides or (), split, what, say)  # type: ignore[arg-type]

"""The command `toast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.files.atomic import try_folder


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("toast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of pictures, parameters and order.")] = 0,
    train: Annotated[int, typer.Option(min=32, max=3000, help="Pictures to train on.")] = 1000,
    test: Annotated[int, typer.Option(min=10, max=1000, help="Held-out pictures.")] = 500,
    generic: Annotated[int, typer.Option(min=64, help="Pictures of stage one.")] = 1000,
    share: Annotated[
        float,
        typer.Option(min=0.01, max=10, help="Fraction of every run's epochs, at least one each."),
    ] = 1.0,
) -> None:
    """Run both stages on embedded pictures, and compare with a linear probe and LoRA. Works offline.

    If it is interrupted, the same command continues. toast report, visualize and compare read its runs.
    """
    try_folder(out, "out")
    try:
        from toast.demo.demonstration import run
        from toast.demo.runs import Size
    except ImportError as error:
        raise ImportError(
            f"the demonstration needs more: pip install 'toast-steering[demo]' ({error})"
        ) from error
    run(out, Size(train, test, generic, share), seed)

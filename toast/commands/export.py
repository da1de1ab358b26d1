"""The command `toast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.commands.view_options import Base, Demo, Weights
from toast.files.atomic import try_file


def export(
    place: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a run or an adapter.")],
    out: Annotated[Path, typer.Option(help="File: .onnx for ONNX Runtime, .pt2 for torch.export.")],
    base: Base = None,
    weights: Weights = None,
    demo: Demo = False,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Pictures of any size, where the model takes them.")
    ] = False,
) -> None:
    """Write a steered model as one file for inference, compared with the model before it is kept.

    The batch may have any size, a text any length; a language model is exported without a cache.
    """
    from toast.training.run_folder import ADAPTER, holds_run

    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--out: needs a file that ends in .onnx or .pt2; got {out.name!r}.")
    try_file(out, "--out")
    adapter = place / ADAPTER if holds_run(place) else place
    if out.suffix == ".onnx":
        import onnxruntime  # noqa: F401 - said before minutes are spent
        import onnxscript  # noqa: F401
    from toast.exporting import export as write
    from toast.report.opening import open_model

    done = write(open_model(place, base, weights, demo), adapter, out, any_size)
    for file in done.files:
        typer.echo(f"{file}: {file.stat().st_size:,} bytes")
    typer.echo(
        f"differs from the model by {done.difference:.1e} of the largest output; steering moves it by "
        f"{done.moved:.1e}{'' if done.fused else '; not fused'}"
    )

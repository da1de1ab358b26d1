"""The command `toast benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from toast.benchmark.names import check_names
from toast.files.atomic import try_folder


def benchmark(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("toast-benchmark"),
    only: Annotated[
        list[str] | None, typer.Option(help="A measure, such as step-16; may be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: PyTorch's choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, xpu, or auto: the accelerator here.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="The lower two under autocast.")
    ] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the models.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Tiny models, to check that it runs.")] = False,
) -> None:
    """Measure the cost of TOAST relative to the plain model, LoRA and others, interleaved."""
    check_names(only or [])
    try_folder(out, "out")
    from toast.benchmark.suite import run

    run(out, only or [], rounds, threads, small, device, dtype, compiled)

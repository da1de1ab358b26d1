"""The command `toast import-official`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def import_official(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Official checkpoint: file, index of shards, or folder."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the adapter; must not hold one yet.")
    ],
    head: Annotated[
        bool | None, typer.Option("--head/--no-head", help="Keep the trained head. Default: if there is one.")
    ] = None,
    kind: Annotated[
        Literal["vision", "language", "convnext"] | None,
        typer.Option(help="If the checkpoint does not show it."),
    ] = None,
) -> None:
    """Write an official TOAST checkpoint as an adapter folder for PEFT. Needs no backbone."""
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    from toast.official.importing import convert

    done = convert(source, out, head, kind)
    rank = f"rank {done.rank}" if done.rank else "full rank"
    typer.echo(
        f"{done.variant}: {done.blocks} blocks, width {done.width}, {rank}{', with its head' * done.head}; "
        f"{done.tensors} tensors, {done.size:,} bytes, in {done.folder}"
    )
    if not done.knows_backbone:
        typer.echo("The checkpoint holds no backbone: load the adapter on the one that it was trained on.")
    typer.echo(
        f"import toast; from peft import PeftModel; model = PeftModel.from_pretrained(backbone, {str(out)!r})"
    )

"""What `toast visualize` and `toast compare` share: their options, and the pictures that they look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toast.visual import methods

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from toast.report.opening import OpenedModel
    from toast.report.samples import Sample

Base = Annotated[
    str | None,
    typer.Option("--model", help="Adapter: its backbone's name in timm, or a folder of transformers."),
]
Weights = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Adapter: file with the backbone's weights (timm)."),
]
Demo = Annotated[bool, typer.Option("--demo", help="Adapter: use the backbone in this package.")]
Split = Annotated[str, typer.Option(help="Of a run: test or validation.")]
Block = Annotated[int, typer.Option(help="Block from 0, or from the top if negative.")]
Head = Annotated[str, typer.Option(help="A head from 0, or mean.", metavar="mean|N")]
Query = Annotated[
    methods.Query | None, typer.Option(help="What attends: the class token, or the patches on average.")
]
Method = Annotated[methods.Method | None, typer.Option(help="How maps are computed.")]


def read_head(text: str) -> int | str:
    """Returns the number of a head, or `mean`."""
    if text == "mean":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--head: needs a number or mean; got {text!r}.") from None


def open_samples(opened: OpenedModel, what: list[str], split: str, most: int | None) -> Iterator[Sample]:
    """Returns the pictures that are named; without any, those of a split."""
    from toast.data.vision import transforms
    from toast.report import samples

    transform = transforms(opened.backbone.data, train=False)
    if what:
        return samples.of_files(samples.find_pictures(map(Path, what)), transform, _skipped)
    return samples.of_split(samples.open_split(opened.config, split), transform, most, _skipped)


def _skipped(reason: str) -> None:
    typer.secho(f"skipped {reason}", err=True, fg="yellow")


def show(shown: RenderableType) -> None:
    """Prints what rich lays out."""
    from rich.console import Console

    Console().print(shown)

"""The command `toast compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toast.commands.view_options import (
    Base,
    Block,
    Demo,
    Head,
    Method,
    Query,
    Split,
    Weights,
    open_samples,
    read_head,
    show,
)
from toast.files.atomic import try_folder

if TYPE_CHECKING:
    from toast.report.opening import OpenedModel


def compare(
    places: Annotated[
        list[Path], typer.Argument(metavar="RUN|ADAPTER", help="Runs or adapters with the same backbone.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for comparison.json and comparison.csv.")] = Path(
        "toast-compare"
    ),
    split: Split = "test",
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Instead of a split: folder of pictures; with boxes.json, boxes.csv or masks/ beside them, "
            "targets are measured as well.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures of the split. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 32,
    base: Base = None,
    weights: Weights = None,
    demo: Demo = False,
    block: Block = -1,
    head: Head = "mean",
    query: Query = None,
    method: Method = None,
) -> None:
    """Compare models with the frozen one: accuracy, entropy of the attention, and how far it moved.

    Where targets are known, attention and selection on them are measured as well.
    """
    from toast.training.run_folder import holds_run

    try_folder(out, "--out")
    attending = read_head(head)
    for place in places:
        holds_run(place)
    from toast.report.opening import check_same_backbone, frozen_model, open_model
    from toast.report.samples import TargetCounts, batches
    from toast.visual import comparing

    counted = TargetCounts()
    opened = [open_model(place, base, weights, demo) for place in places]
    check_same_backbone(opened)
    models = {name: each.model for name, each in zip(_names(places), opened, strict=True)}
    frozen = frozen_model(opened)
    if frozen is not None:
        models[comparing.FROZEN] = frozen
    samples = open_samples(opened[0], [] if images is None else [str(images)], split, limit)
    comparison = comparing.compare(
        models,
        batches(samples, batch_size, counted),
        classifiers=_classifiers(models, opened),
        block=block,
        head=attending,
        query=query,
        method=method,
    )
    files = [comparison.save(out / f"comparison.{kind}") for kind in ("json", "csv")]
    show(comparison.table())
    for names, what in ((counted.away, "a target that is cropped away"), (counted.without, "no target")):
        if names and comparison.in_sight + comparison.out_of_sight:
            typer.echo(f"{len(names)} of the pictures have {what}, first {names[0]}.")
    if not comparison.in_sight:
        typer.echo(
            "No target is visible, so nothing is measured on targets. This needs boxes.json or boxes.csv "
            "beside the pictures, with their paths from there, or grey pictures in masks/, white on targets."
        )
    typer.echo("  ".join(str(file) for file in files))


def _classifiers(models: dict[str, Any], opened: list[OpenedModel]) -> list[str]:
    """Returns the models that are asked for a class: with a trained head for the first one's classes."""
    return [
        name
        for name, each in zip(models, opened, strict=False)  # the frozen one stands last, if at all
        if each.classifies and each.classes == opened[0].classes
    ]


def _names(places: list[Path]) -> list[str]:
    """Returns a name for each model: the last parts of its path, as few as tell it from the others."""
    from toast.visual.comparing import FROZEN

    parts = [place.resolve().parts for place in places]
    if len(set(parts)) < len(parts):
        raise ValueError(f"compare: needs each run once; got {', '.join(map(str, places))}.")
    names = []
    for own in parts:
        short = (own[-count:] for count in range(1, len(own) + 1))
        alone = (end for end in short if sum(other[-len(end) :] == end for other in parts) == 1)
        names.append(next("/".join(end) for end in alone if end != (FROZEN,)))
    return names

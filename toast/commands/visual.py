"""The commands that show where models look: `toast visualize`, `toast compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toast.files.atomic import try_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from toast.report.opening import Opened
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
    str | None,
    typer.Option(help="What attends: the class token, or the patches on average.", metavar="class|mean"),
]
Method = Annotated[
    str | None,
    typer.Option(help="How maps are computed.", metavar="attention|rollout|relevance|grad-cam|energy"),
]


def visualize(
    place: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a run or an adapter.")],
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES|PROMPTS",
            help="Pictures or folders of pictures. Default: some of the run's split. Language: prompts, or "
            "@FILE for the text of a file.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the drawings and the arrays behind them.")] = Path(
        "toast-visual"
    ),
    base: Base = None,
    weights: Weights = None,
    demo: Demo = False,
    split: Split = "test",
    count: Annotated[int, typer.Option(min=1, help="Pictures of the split.")] = 6,
    block: Block = -1,
    head: Head = "mean",
    query: Query = None,
    method: Method = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="png, svg or pdf; may be given several times.")
    ] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Interpolate between patches.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Language: tokens to generate.")] = 40,
    chat: Annotated[bool, typer.Option("--chat", help="Language: prompts are a user's messages.")] = False,
) -> None:
    """Draw attention before and after steering, and the selection weights.

    Boxes from boxes.json or boxes.csv beside the pictures are drawn in.
    """
    from toast.report.opening import open_model

    try_folder(out, "--out")
    opened = open_model(place, base, weights, demo)
    options: dict[str, Any] = {"block": block, "head": _head(head)}
    if opened.is_language:
        for_pictures = {"--query": query, "--method": method, "--format": formats, "--smooth": smooth}
        given = [name for name, value in for_pictures.items() if value]
        if given:
            raise ValueError(f"{', '.join(given)}: for pictures; {opened.name} is a language model.")
        _show_texts(opened, what or [], out, {**options, "max_new_tokens": tokens, "chat": chat})
        return
    samples = _samples(opened, what or [], split, count)
    _show_pictures(
        opened, samples, out, formats or ["png"], smooth, {**options, "query": query, "method": method}
    )


def _show_pictures(
    opened: Opened,
    samples: Iterator[Sample],
    out: Path,
    formats: list[str],
    smooth: bool,
    options: dict[str, Any],
) -> None:
    from toast.report.showing import show_samples

    some = False
    for files in show_samples(opened, samples, out, formats=formats, smooth=smooth, **options):
        typer.echo("  ".join(str(file) for file in files))
        some = True
    if not some:
        raise ValueError("images: none of the pictures can be read.")


def _show_texts(opened: Opened, what: list[str], out: Path, options: dict[str, Any]) -> None:
    from toast.report.showing import show_texts
    from toast.visual.text.terminal import as_terminal

    if not what:
        raise ValueError(f"{opened.name} is a language model: needs prompts, or @FILE for a file's text.")
    prompts = [_prompt(text) for text in what]
    for views, files in show_texts(opened.model, opened.backbone.tokenizer, prompts, out, **options):
        _print(as_terminal(views))
        typer.echo("  ".join(str(file) for file in files))


def _prompt(text: str) -> str:
    """Returns a prompt; of `@FILE` the text of the file without the line feed at its end."""
    from toast.files.plain_text import half_pair, read_text

    if not text.startswith("@"):
        if half := half_pair(text):
            raise ValueError(
                f"prompt {text!a}: not UTF-8 ({half}). Set the terminal to UTF-8, or pass @FILE."
            )
        return text
    try:
        return read_text(Path(text[1:])).removesuffix("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{text}: needs a text file in UTF-8: {error}") from error


def _head(text: str) -> int | str:
    if text == "mean":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--head: needs a number or mean; got {text!r}.") from None


def _samples(opened: Opened, what: list[str], split: str, most: int | None) -> Iterator[Sample]:
    """Returns the pictures that are named; without any, those of a split."""
    from toast.data.vision import transforms
    from toast.report import samples

    transform = transforms(opened.backbone.data, train=False)
    if what:
        return samples.of_files(samples.find_pictures(map(Path, what)), transform, _skipped)
    return samples.of_split(samples.open_split(opened.config, split), transform, most, _skipped)


def _skipped(reason: str) -> None:
    typer.secho(f"skipped {reason}", err=True, fg="yellow")


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
    from toast.report.opening import check_same_backbone, frozen_model, open_model
    from toast.report.samples import Counted, batches
    from toast.visual import comparing

    counted = Counted()
    try_folder(out, "--out")
    opened = [open_model(place, base, weights, demo) for place in places]
    check_same_backbone(opened)
    models = {name: each.model for name, each in zip(_names(places), opened, strict=True)}
    frozen = frozen_model(opened)
    if frozen is not None:
        models[comparing.FROZEN] = frozen
    samples = _samples(opened[0], [] if images is None else [str(images)], split, limit)
    comparison = comparing.compare(
        models, batches(samples, batch_size, counted),
        classifiers=_classifiers(models, opened),
        block=block, head=_head(head), query=query, method=method,
    )  # fmt: skip
    files = [comparison.save(out / f"comparison.{kind}") for kind in ("json", "csv")]
    _print(comparison.table())
    for names, said in ((counted.away, "a target that is cropped away"), (counted.without, "no target")):
        if names and comparison.in_sight + comparison.out_of_sight:
            typer.echo(f"{len(names)} of the pictures have {said}, first {names[0]}.")
    if not comparison.in_sight:
        typer.echo(
            "No target is visible, so nothing is measured on targets. This needs boxes.json or boxes.csv "
            "beside the pictures, with their paths from there, or grey pictures in masks/, white on targets."
        )
    typer.echo("  ".join(str(file) for file in files))


def _classifiers(models: dict[str, Any], opened: list[Opened]) -> list[str]:
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


def _print(shown: RenderableType) -> None:
    from rich.console import Console

    Console().print(shown)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    for command in (visualize, compare):
        app.command()(command)

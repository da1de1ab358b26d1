"""The command `toast visualize`."""

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
from toast.visual.methods import check_formats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toast.report.opening import OpenedModel
    from toast.report.samples import Sample


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
    chat: Annotated[
        bool, typer.Option("--chat", help="Language: format prompts as a user's messages.")
    ] = False,
) -> None:
    """Draw attention before and after steering, and the selection weights.

    Boxes from boxes.json or boxes.csv beside the pictures are drawn in.
    """
    from toast.training.run_folder import holds_run

    try_folder(out, "--out")
    options: dict[str, Any] = {"block": block, "head": read_head(head)}
    check_formats(formats or ["png"])
    holds_run(place)
    from toast.report.opening import open_model

    opened = open_model(place, base, weights, demo)
    if opened.is_language:
        for_pictures = {"--query": query, "--method": method, "--format": formats, "--smooth": smooth}
        given = [name for name, value in for_pictures.items() if value]
        if given:
            raise ValueError(f"{', '.join(given)}: for pictures; {opened.name} is a language model.")
        _show_texts(opened, what or [], out, {**options, "max_new_tokens": tokens, "chat": chat})
        return
    samples = open_samples(opened, what or [], split, count)
    _show_pictures(
        opened, samples, out, formats or ["png"], smooth, {**options, "query": query, "method": method}
    )


def _show_pictures(
    opened: OpenedModel,
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


def _show_texts(opened: OpenedModel, what: list[str], out: Path, options: dict[str, Any]) -> None:
    from toast.visual.text.exporting import export_texts
    from toast.visual.text.terminal import as_terminal

    if not what:
        raise ValueError(f"{opened.name} is a language model: needs prompts, or @FILE for a file's text.")
    prompts = [_prompt(text) for text in what]
    for maps, files in export_texts(opened.model, opened.backbone.tokenizer, prompts, out, **options):
        show(as_terminal(maps))
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

"""The command `toast`. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import toast as package
from toast.commands import reporting, training, visual
from toast.commands.errors import DEBUG, Commands

app = typer.Typer(
    cls=Commands,
    help="Top-down attention steering of frozen transformers (TOAST, arXiv 2305.15542).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"toast {package.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error; so does ${DEBUG}.")
    ] = False,
) -> None:
    """Takes the options of the command itself."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("toast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of pictures, parameters and order.")] = 0,
    train: Annotated[int, typer.Option(min=32, max=3000, help="Pictures to train on.")] = 1000,
    test: Annotated[int, typer.Option(min=10, max=1000, help="Held-out pictures.")] = 500,
    generic: Annotated[int, typer.Option(min=64, help="Pictures of stage one.")] = 1000,
    share: Annotated[
        float, typer.Option(min=0.01, max=10, help="Fraction of every run's epochs, at least one each.")
    ] = 1.0,
) -> None:
    """Run both stages on embedded pictures, and compare with a linear probe and LoRA. Works offline.

    If it is interrupted, the same command continues. toast report, visualize and compare read its runs.
    """
    try:
        from toast.demo.demonstration import run
        from toast.demo.runs import Size
    except ImportError as error:
        raise ImportError(
            f"the demonstration needs more: pip install 'toast-steering[demo]' ({error})"
        ) from error
    run(out, Size(train, test, generic, share), seed)


_Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Causal language model with its tokenizer.")
]
_Adapter = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="TOAST adapter. Default: a new one.")
]


@app.command()
def generate(
    model: _Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    adapter: _Adapter = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. Default: greedy decoding.")] = None,
) -> None:
    """Continue a prompt with a steered language model.

    A new adapter gives exactly the text of the frozen model.
    """
    from toast.generation.prompting import continue_prompt

    typer.echo(continue_prompt(model, prompt, adapter, tokens, seed))


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("toast-benchmark"),
    only: Annotated[
        list[str] | None, typer.Option(help="A measure, such as step-16; may be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: PyTorch's choice.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Tiny models, to check that it runs.")] = False,
) -> None:
    """Measure the cost of TOAST relative to the plain model, LoRA and others, interleaved."""
    from toast.benchmark.running import run

    run(out, only or [], rounds, threads, small)


@app.command()
def families() -> None:
    """List the supported families: where each is steered, what the tests verify, and what is refused."""
    from toast.families.listing import table

    typer.echo(table())


@app.command()
def import_official(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Official checkpoint: file, index of shards, or folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the adapter, without one yet.")],
    head: Annotated[
        bool | None, typer.Option("--head/--no-head", help="Keep the trained head. Default: if there is one.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="vision, language or convnext, if the checkpoint does not show it.")
    ] = None,
) -> None:
    """Write an official TOAST checkpoint as an adapter folder for PEFT. Needs no backbone."""
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


for commands in (training, visual, reporting):
    commands.register(app)


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()

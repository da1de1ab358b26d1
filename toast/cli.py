"""The command `toast`, put together from `toast.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

import toast as package
from toast.commands.benchmark import benchmark
from toast.commands.compare import compare
from toast.commands.configs import configs
from toast.commands.demo import demo
from toast.commands.errors import DEBUG, Commands
from toast.commands.evaluate import evaluate
from toast.commands.export import export
from toast.commands.families import families
from toast.commands.features import features
from toast.commands.generate import generate
from toast.commands.import_official import import_official
from toast.commands.plan import plan
from toast.commands.report import report
from toast.commands.sweep import sweep
from toast.commands.train import pretune, tune
from toast.commands.visualize import visualize

app = typer.Typer(
    cls=Commands,
    help="Top-down attention steering of frozen transformers (TOAST, arXiv 2305.15542).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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


# In the order in which the help lists them.
for command in (
    demo, generate, benchmark, families, import_official, configs, plan, pretune, tune, evaluate, sweep,
    features, visualize, compare, report, export,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Runs the command."""
    app()

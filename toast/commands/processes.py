"""Commands on several processes, as `accelerate launch` starts them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from toast.commands.errors import run_script


def say(text: str) -> None:
    """Prints a text once for all processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)


def script(command: Callable[..., None]) -> None:
    """Runs a command as a script whose configuration is the option `--config`."""
    arguments = sys.argv[1:]
    if "--config" in arguments:
        place = arguments.index("--config")
        arguments = [*arguments[place + 1 : place + 2], *arguments[:place], *arguments[place + 2 :]]
    try:
        run_script(command, arguments)
    finally:
        from accelerate import PartialState

        PartialState().destroy_process_group()

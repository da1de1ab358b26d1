"""The command `toast configs`."""

from __future__ import annotations

import typer


def configs() -> None:
    """List the shipped configurations, each with the command that it is written for.

    toast finds configs/... from any folder, unless the working folder has a file of the same path.
    """
    from toast.training.shipped import shipped_commands, shipped_folder

    typer.echo(f"configs/ is {shipped_folder()}")
    for command in shipped_commands():
        typer.echo(command)

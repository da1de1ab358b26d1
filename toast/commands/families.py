"""The command `toast families`."""

from __future__ import annotations

import typer


def families() -> None:
    """Print the known families: where each is steered, what was verified, and what is refused."""
    from toast.families.listing import table

    typer.echo(table())

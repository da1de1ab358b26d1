"""The command `toast families`."""

from __future__ import annotations

import typer


def families() -> None:
    """List the supported families: where each is steered, what the tests verify, and what is refused."""
    from toast.families.listing import table

    typer.echo(table())

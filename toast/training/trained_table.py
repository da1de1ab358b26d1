"""The table of what a run trains, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table


def trained_table(
    groups: Mapping[str, int], everything: int, rates: Mapping[str, Sequence[float]] | None = None
) -> Table:
    """Returns a table of the trained groups, with how many parameters are trained and how many there are.

    Args:
        groups: Parameters of each trained group.
        everything: All parameters of the model.
        rates: The peak rates of each group; None leaves them out.
    """
    table = Table(title="trained", title_justify="left")
    table.add_column("group")
    table.add_column("parameters", justify="right")
    if rates is not None:
        table.add_column("peak rate", justify="right")
    for name, count in groups.items():
        shown = [] if rates is None else [", ".join(f"{rate:.2e}" for rate in rates[name])]
        table.add_row(name, f"{count:,}", *shown)
    table.add_section()
    table.add_row("all trained", f"{sum(groups.values()):,}")
    table.add_row("all", f"{everything:,}")
    return table

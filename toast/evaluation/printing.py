"""Measures as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def as_table(metrics: Mapping[str, Any], title: str = "") -> Table:
    """Lays measures out for rich: a row for each number; lists and matrices are left to the files.

    Args:
        metrics: Name -> value, as of `VisionMetrics.compute`; nested ones, as of lm-eval, under `task/name`.
        title: Above the table.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError("tables need rich: pip install 'toast-steering[demo]'") from error
    table = Table("measure", title=title or None)
    table.add_column("value", justify="right")
    for name, value in _numbers(metrics):
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    return table


def _numbers(metrics: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{within}{name}/")
        elif isinstance(value, (int, float)):
            yield within + name, value

"""What the report's templates lay out: cells of tables, and times in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell that is more than a text.

    Args:
        text: What stands there.
        note: Small, behind it.
        share: Of the cell's width, 0 to 1, that a bar behind the text takes; None draws none.
        is_best: Whether it stands out.
        is_code: Whether it is code.
    """

    text: str
    note: str = ""
    share: float | None = None
    is_best: bool = False
    is_code: bool = False


def seconds(value: float) -> str:
    """Returns a time in words."""
    if value < 100:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes_ = divmod(minutes, 60)
    return f"{hours} h {minutes_} min" if hours else f"{minutes} min {rest} s"

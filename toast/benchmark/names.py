"""The measures of `toast benchmark` by name; what makes them (`suite.py`) takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterable

#: In the order in which they run.
NAMES = (
    "forward", "depth", "tasks", "step-16", "step-32", "memory", "waits", "decode", "prefill", "checkpoint",
    "help",
)  # fmt: skip


def check_names(only: Iterable[str]) -> None:
    """Checks that measures are known.

    Raises:
        ValueError: If one is not.
    """
    unknown = sorted(set(only) - set(NAMES))
    if unknown:
        raise ValueError(f"only: needs some of {', '.join(NAMES)}; got {', '.join(unknown)}.")

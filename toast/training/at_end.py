"""What is measured beside the test split when a run has ended: further splits, and corrupted pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toast.training.data import Splits
from toast.training.split_measures import Measured

#: Measures data under a name; None if a signal came.
Measure = Callable[[Any, str], Measured | None]


def beside_test(splits: Splits, measure: Measure) -> dict[str, Any]:
    """Returns the figures of all that a run measures once beside its test split.

    Returns:
        `splits`: figures by split; `corrupted`: as `under_corruption`. Each only if it is configured.
    """
    further = {name: _figures(measure(data, name)) for name, data in splits.further.items()}
    return ({"splits": further} if further else {}) | under_corruption(splits, measure)


def under_corruption(splits: Splits, measure: Measure) -> dict[str, Any]:
    """Returns the figures of the corrupted test split, if configured.

    Returns:
        `corrupted`: figures by corruption and severity, the latter as text.
    """
    corrupted: dict[str, dict[str, Any]] = {}
    for name, by_severity in splits.corrupted.items():
        for severity, data in by_severity.items():
            figures = _figures(measure(data, f"test, {name} {severity}"))
            corrupted.setdefault(name, {})[str(severity)] = figures
    return {"corrupted": corrupted} if corrupted else {}


def _figures(measured: Measured | None) -> dict[str, Any] | None:
    return None if measured is None else measured.metrics

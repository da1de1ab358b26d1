"""Which value of a measure is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Of these the least is the best, of others the greatest.
LESS_IS_BETTER = ("loss", "perplexity", "calibration_error", "mae")
#: By task: what is measured on a split and can choose.
CHOOSING = {
    "vision": (
        "accuracy", "mean_class_accuracy", "top5_accuracy", "loss", "calibration_error",
        "attention_on_target", "selection_ratio",
    ),
    "language": ("loss", "perplexity", "token_accuracy"),
}  # fmt: skip


def less_is_better(name: str) -> bool:
    """Whether the least of a measure is the best; one of several heads has the head's name before a dot."""
    return name.rpartition(".")[2] in LESS_IS_BETTER


def best_of(values: Sequence[float], by: str) -> int | None:
    """Returns the place of the best finite value, of equals the first; None if none is finite."""
    places = [place for place, value in enumerate(values) if math.isfinite(value)]
    if not places:
        return None
    return (min if less_is_better(by) else max)(places, key=values.__getitem__)

"""Means of what is measured on targets of pictures, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toast.evaluation.aggregation import Average
from toast.visual.targets import ATTENTION, INSIDE, OUTSIDE, RATIO, ratio


class TargetMeans:
    """Attention and selection on targets, and how many targets are in sight.

    Args:
        device: Where values will be.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.on_target = {name: Average(device) for name in (ATTENTION, INSIDE, OUTSIDE)}
        self.sight = Average(device)

    def update(self, on_target: Mapping[str, Tensor], has_target: Tensor | None, counted: Tensor) -> None:
        """Adds a batch.

        Args:
            on_target: What `toast.visual.targets.measure` gives, by its names, `(batch,)` each; not a number
                where no target is in sight.
            has_target: Which samples have a target, in sight or not, `(batch,)`; None is those that were
                measured.
            counted: Which samples count, `(batch,)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        for name, values in on_target.items():
            if values.shape != counted.shape:
                raise ValueError(f"{name}: needs shape {tuple(counted.shape)}; got {tuple(values.shape)}.")
        if not counted.any():
            return
        for name, values in on_target.items():
            held = values.detach().to(counted.device)[counted]
            self.on_target[name].update(held[~held.isnan()])
        if ATTENTION in on_target:
            seen = ~on_target[ATTENTION].to(counted.device).isnan()[counted]
            known = seen if has_target is None else has_target.to(counted.device)[counted]
            self.sight.update(seen[known].float())

    def compute(self) -> dict[str, Any]:
        """Returns the means, and how many targets were in sight and not; empty if there were no targets."""
        means = {name: metric.compute() for name, metric in self.on_target.items()}
        sight, targets = self.sight.compute()
        if not targets:
            return {}
        seen, targets = round(float(sight * targets)), int(targets)
        held = {name: float(mean) for name, (mean, count) in means.items() if count}
        found = ratio(held)
        counts = {"targets_in_sight": seen, "targets_out_of_sight": targets - seen}
        return counts | held | ({} if found is None else {RATIO: found})

    def reset(self) -> None:
        """Forgets all samples."""
        for average in (self.sight, *self.on_target.values()):
            average.reset()

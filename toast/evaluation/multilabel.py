"""Measures of several labels a sample, over all processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toast.evaluation.aggregation import Average, joining, labelled


class MultilabelMetrics:
    """The average precision of each label, and their mean.

    Args:
        labels: Number of labels.
        losses: Of each sample of a batch.
        device: Where logits will be.
    """

    def __init__(
        self, labels: int, losses: Callable[[Tensor, Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        from torchmetrics.classification import MultilabelAveragePrecision

        self.labels, self.losses = labels, losses
        # It refuses one label; two of the same serve as well.
        self.precision = MultilabelAveragePrecision(max(2, labels), average=None).to(device)
        self.loss = Average(device)
        self.has = [Average(device) for _ in range(labels)]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: `(batch, labels)`.
            labels: 1 where a sample has the label, else 0, `(batch, labels)`; NaN leaves a sample out.

        Raises:
            ValueError: If the shapes do not fit.
        """
        logits, labels = labelled(logits, labels, self.labels)
        if not len(labels):
            return
        self.loss.update(self.losses(logits, labels))
        for average, column in zip(self.has, labels.T, strict=True):
            average.update(column)
        wide = (1, 2) if self.labels == 1 else (1, 1)
        self.precision.update(logits.sigmoid().repeat(wide), labels.long().repeat(wide))

    def compute(self) -> dict[str, Any]:
        """Returns the measures of all samples of all processes.

        Returns:
            By name: `samples`; `loss`, the mean; `label_average_precision`, by label, None for one that no
            sample has; `mean_average_precision`, the mean over the others, not a number if there are none.

        Raises:
            ValueError: If no process has seen a sample with labels.
        """
        with joining(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive samples", category=UserWarning)
            loss, samples = self.loss.compute()
            if not samples:
                raise ValueError("no sample with labels was measured; needs at least one.")
            shown = [float(average.compute()[0]) > 0 for average in self.has]
            found = self.precision.compute()[: self.labels].tolist()
        by_label = [value if has else None for value, has in zip(found, shown, strict=True)]
        known = [value for value in by_label if value is not None]
        return {
            "samples": int(samples),
            "loss": float(loss),
            "mean_average_precision": sum(known) / len(known) if known else float("nan"),
            "label_average_precision": by_label,
        }

"""Measures of predicted numbers, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toast.evaluation.aggregation import Average, joining, labelled


class RegressionMetrics:
    """R² and the mean absolute error of numbers, the mean over their columns.

    Args:
        mean: Of the training split, `(columns,)`.
        deviation: The same of the standard deviation; outputs are in these units, from the mean.
        losses: Of each sample of a batch.
        device: Where outputs will be.
    """

    def __init__(
        self,
        mean: Tensor,
        deviation: Tensor,
        losses: Callable[[Tensor, Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        from torchmetrics import R2Score

        self.mean, self.deviation, self.losses = mean.to(device), deviation.to(device), losses
        # Of values in standard deviations: sums of squares of large numbers that hardly differ are not exact.
        self.r2 = R2Score(multioutput="uniform_average").to(device)
        self.loss, self.error = Average(device), Average(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: `(batch, columns)`.
            labels: The numbers, `(batch, columns)`; NaN leaves a sample out.

        Raises:
            ValueError: If the shapes do not fit.
        """
        logits, labels = labelled(logits, labels, len(self.mean))
        if not len(labels):
            return
        self.loss.update(self.losses(logits, labels))
        wanted = (labels - self.mean) / self.deviation
        self.r2.update(logits, wanted)
        self.error.update(((logits - wanted) * self.deviation).abs().mean(-1))

    def compute(self) -> dict[str, Any]:
        """Returns the measures of all samples of all processes.

        Returns:
            By name: `samples`; `loss`, the mean; `mae`, the mean absolute error in the units of the labels;
            `r2`, the share of the variance that is explained, at most 1 and of the mean 0, if there are two
            samples or more.

        Raises:
            ValueError: If no process has seen a sample with a label.
        """
        with joining():
            loss, samples = self.loss.compute()
            error, _ = self.error.compute()
            if not samples:
                raise ValueError("no sample with a label was measured; needs at least one.")
            explained = {"r2": float(self.r2.compute())} if samples > 1 else {}
        return {"samples": int(samples), "loss": float(loss), **explained, "mae": float(error)}

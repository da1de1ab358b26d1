"""Means over what several processes have seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import torchmetrics
except ImportError as error:
    raise ImportError("measuring needs torchmetrics: pip install 'toast-steering[train]'") from error

#: The label that is left out, as in PyTorch and transformers.
IGNORED = -100


class Average(torchmetrics.Metric):
    """Mean of values, and how many there were; `compute` joins the processes.

    Sums are kept in double precision where the device has it: beside millions of tokens, float32 would lose
    the single one.

    Args:
        device: Where values will be.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.precision = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.add_state("total", torch.zeros((), dtype=self.precision), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.to(device)

    def update(self, values: Tensor) -> None:
        """Adds values of any shape; none is allowed."""
        self.total += values.detach().to(self.precision).sum()
        self.count += values.numel()

    def compute(self) -> Any:
        """Returns the mean, not a number if there were no values, and the count."""
        return self.total / self.count, self.count


def labelled(logits: Tensor, labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Returns the samples of a batch whose labels are all there, in float32; maybe none.

    Args:
        logits: `(batch, columns)`.
        labels: `(batch, columns)`; NaN leaves a sample out.
        columns: What both need.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.shape != labels.shape or logits.shape[1:] != (columns,):
        raise ValueError(
            f"logits, labels: need shapes (batch, {columns}); got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    counted = ~labels.isnan().any(-1)
    return logits.detach()[counted].float(), labels[counted].float()


@contextmanager
def joining() -> Iterator[None]:
    """Silences the warning of a process that has seen nothing: the others may have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        yield

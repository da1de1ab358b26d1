"""The best measurement of a run so far: its figures, and what was trained by then.

Under FSDP each process keeps its own part, as it does of what is trained now.
"""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from toast.evaluation.choosing import best_of
from toast.training.trained_state import put_back, spread, trained_state


class Best:
    """Keeps what was trained when the validation split's measure was best, in the memory of the machine.

    Args:
        accelerator: What prepared the objective.
        objective: Holds what is trained.
        by: The measure; None keeps nothing.
        patience: Measurements without a better one after which training is over; None goes on to the end.

    Attributes:
        step: Steps that were made when it was best; None before the first finite measurement.
        figures: What was measured then.
        since: Measurements since then.
        weights: What was trained by then; under FSDP this process's part of each tensor.

    Raises:
        ValueError: If DeepSpeed's engine holds what is trained.
    """

    def __init__(
        self, accelerator: Accelerator, objective: nn.Module, by: str | None, patience: int | None
    ) -> None:
        if by is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "checkpoint.best: needs one process, data parallel ones or FSDP; this launch is DeepSpeed's, "
                "whose engine keeps what is trained in a format of its own. Leave it out, or launch with "
                "configs/accelerate/fsdp2.yaml."
            )
        self.accelerator = accelerator
        self.objective = objective
        self.by = by
        self.patience = patience
        self.step: int | None = None
        self.figures: dict[str, Any] = {}
        self.since = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether so many measurements have passed that training is over."""
        return self.patience is not None and self.since >= self.patience

    def note(self, step: int, figures: dict[str, Any]) -> bool:
        """Takes a measurement; returns whether it is the best.

        Raises:
            ValueError: If the measure is not among the figures.
        """
        if self.by is None:
            return False
        value = figures.get(self.by)
        if value is None:
            known = ", ".join(name for name, held in figures.items() if isinstance(held, float))
            raise ValueError(
                f"checkpoint.best: {self.by} was not measured on the validation split; choose one of {known}."
            )
        before = self.figures.get(self.by, math.nan)
        if best_of([before, value], self.by) != 1:
            self.since += 1
            return False
        self.step, self.figures, self.since = step, figures, 0
        self.weights = {
            name: tensor.cpu() for name, tensor in trained_state(self.accelerator, self.objective).items()
        }
        return True

    def take_up(self) -> None:
        """Puts back what was trained when it was best; what is trained now is forgotten."""
        if self.weights:
            put_back(self.accelerator, self.objective, self.weights)

    def progress(self) -> dict[str, Any]:
        """Returns what has to be known to go on, beside the weights."""
        return {"step": self.step, "figures": self.figures, "since": self.since}

    def restore(self, progress: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Takes up what `progress` returned, and the weights, each whole."""
        self.step, self.figures, self.since = progress["step"], progress["figures"], progress["since"]
        trained = trained_state(self.accelerator, self.objective) if weights else {}
        parts = {name: spread(whole, trained.get(name, whole)) for name, whole in weights.items()}
        self.weights = {name: part.cpu() for name, part in parts.items()}

    def summary(self) -> dict[str, Any]:
        """Returns what a run's result says of it; empty if nothing was kept."""
        if self.step is None:
            return {}
        held = {"measure": self.by, "value": self.figures[self.by or ""], "step": self.step}
        return {"best": {**held, "stopped_early": self.is_over}}

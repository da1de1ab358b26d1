"""The training loop: the way of a step, from its micro-batches to its update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from toast.training.finite import not_finite, over_processes, read
from toast.training.optimizers import set_rates
from toast.training.run_config import RunConfig
from toast.training.training_batches import Batch, TrainingBatches


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Args:
        number: Counted from 1, so this many steps are done with it.
        losses: Losses, norm of the gradient and rate, `()`; the same in every process.
        bad: What of it is not finite, if that is looked at before the update; the step is then left out.
    """

    number: int
    losses: dict[str, Tensor | float]
    bad: list[str]


class Loop:
    """Makes the steps of a run.

    It leaves the modes of the model's modules as they are: a batch norm that was put into evaluation mode
    keeps its statistics.

    Args:
        accelerator: What prepared objective, optimiser and batches.
        objective: The loss (`toast.training.objective.Objective`).
        optimizer: The optimiser.
        schedule: timm's schedule.
        batches: Gives the micro-batches of each step.
        trained: The parameters that are trained.
        config: The run's configuration: its task and seed, how gradients are clipped, and what becomes of a
            step whose numbers are not finite.
        total: Steps of the run.

    Attributes:
        seconds: Spent in steps so far, those of earlier sessions included.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: Any,
        schedule: Any,
        batches: TrainingBatches,
        trained: Sequence[nn.Parameter],
        config: RunConfig,
        total: int,
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.batches = batches
        self.trained = list(trained)
        self.config = config
        self.total = total
        self.seconds = 0.0

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Makes the steps that are left, one each time it is asked.

        Of a step that is not finite and that the run ends with (`on_nonfinite: stop`), nothing has been
        changed when it is handed out: what is saved then is from before it.

        Args:
            start: Steps that were made before.
        """
        micro_batches = self.batches.steps(start, self.total)
        for step in range(start, self.total):
            began = time.perf_counter()
            losses = self._gradient(step, next(micro_batches))
            bad = not_finite(read(losses), self.is_scaled) if self.is_watched else []
            # A loss scaler leaves steps out by itself, and has to be told of each that the run goes on from.
            if not bad or (self.is_scaled and self.config.on_nonfinite == "skip"):
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.seconds += time.perf_counter() - began
            yield Step(step + 1, {**losses, "learning_rate": self.optimizer.param_groups[0]["lr"]}, bad)

    def _gradient(self, step: int, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """Computes one gradient from the losses of all micro-batches and processes.

        Returns:
            The losses, and the norm of the gradient before it was clipped.
        """
        accelerator = self.accelerator
        # What is drawn is a function of seed, step and process, so a resumed run draws the same.
        set_seed(hash((self.config.seed, step, accelerator.process_index)) % 2**32)
        set_rates(self.schedule, step)
        share = len(micro_batches) * accelerator.num_processes
        answers = self.batches.splits.answers
        counted = torch.stack([answers.counted(batch["labels"]) for batch in micro_batches]).sum()
        count = accelerator.reduce(counted, "sum").clamp(min=1)
        parts: dict[str, Tensor] = {}
        for batch in micro_batches:
            # Gradients are exchanged with the last of them.
            with accelerator.accumulate(self.objective):
                losses = self.objective(self.batches.complete(batch, step), count, share)
                accelerator.backward(losses["loss"])
            for name, value in losses.items():
                part = value.detach() / len(micro_batches)
                parts[name] = parts[name] + part if name in parts else part
        most = math.inf if self.config.optimizer.clip is None else self.config.optimizer.clip
        norm = accelerator.clip_grad_norm_(self.trained, most)
        if norm is not None:  # DeepSpeed's engine may keep it to itself; it gives a number
            parts["gradient_norm"] = torch.as_tensor(norm, device=accelerator.device)
        return over_processes(accelerator, parts)

    @property
    def is_watched(self) -> bool:
        """Whether a step's numbers are looked at before its update: if asked for, or if it costs no wait.

        Else they are read with the log, and come to light a few steps late.
        """
        return self.config.on_nonfinite == "skip" or self.accelerator.device.type == "cpu"

    @property
    def is_scaled(self) -> bool:
        """Whether a loss scaler is at work, as it is in fp16."""
        return self.accelerator.scaler is not None

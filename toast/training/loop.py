"""The training loop: the way of a step, in one function."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn

from toast.rates import Groups
from toast.training.finite import not_finite, over_processes, read
from toast.training.interrupts import Wish
from toast.training.objective import targets
from toast.training.optimizers import set_rates
from toast.training.order import EpochBatches
from toast.training.workers import batches as batches_of

Batch = dict[str, Any]


@dataclass
class Loop:
    """All that a step needs.

    Args:
        accelerator: Prepared what follows.
        objective: The loss (`toast.training.objective.Objective`).
        optimizer: The optimiser.
        schedule: timm's schedule.
        loader: Gives micro-batches of an epoch.
        order: Chooses the epoch, and where in it to start.
        groups: What is trained, by group.
        task: `vision` or `language`.
        total: Steps of the run.
        seed: Of what is drawn in a step, such as dropout.
        clip: Greatest norm of the gradients; None does not clip.
        watched: Whether a step's numbers are looked at before its update. Else they are read with the log,
            which costs no wait for the device, and come to light a few steps late.
        prepare: Completes a batch of a step, with what is stored of its samples for example.
        on_step: Is told after each step: steps that were made, and the step's losses and rates.
        on_nonfinite: Is told, if `watched`, of a step whose numbers are not finite, before its update: steps
            that were made, and what is not finite. If it returns, the step is left out.
        on_epoch: Is told at the end of each epoch: steps that were made.
        is_over: Whether training is over before its last step, asked at the end of each epoch.
        wish: Whether the run is asked to stop.
    """

    accelerator: Accelerator
    objective: nn.Module
    optimizer: Any
    schedule: Any
    loader: Any
    order: EpochBatches
    groups: Groups
    task: str
    total: int
    seed: int
    clip: float | None
    watched: bool
    prepare: Callable[[Batch, int], Batch]
    on_step: Callable[[int, dict[str, Tensor | float]], None]
    on_nonfinite: Callable[[int, list[str]], None]
    on_epoch: Callable[[int], None]
    is_over: Callable[[], bool]
    wish: Wish = field(init=False)
    seconds: float = field(default=0.0, init=False)
    made: int = field(default=0, init=False)

    def run(self, step: int = 0) -> int:
        """Trains from a step on.

        Args:
            step: Steps that were made before.

        Returns:
            Steps that are made now: all, or fewer if training is over or the run was asked to stop.
        """
        self.made = step
        trained = [parameter for held in self.groups.values() for parameter in held.values()]
        while step < self.total and not self.is_over():
            epoch, start = divmod(step, self.order.steps)
            self.order.choose(epoch, start)
            self.objective.train()
            batches = batches_of(self.loader)
            for _ in range(min(self.order.steps - start, self.total - step)):
                began = time.perf_counter()
                parts = self._step(step, list(itertools.islice(batches, self.order.micro_batches)), trained)
                self.seconds += time.perf_counter() - began
                step += 1
                self.made = step
                if parts is not None:
                    self.on_step(step, parts)
                if self.wish():
                    return step
            self.on_epoch(step)
            if self.wish():
                return step
        return step

    def _step(
        self, step: int, micro_batches: list[Batch], trained: list[nn.Parameter]
    ) -> dict[str, Tensor | float] | None:
        """Makes one step: losses of all micro-batches and processes, one gradient, one update.

        Returns:
            Losses, norm of the gradient and rate; None if the step was left out.
        """
        accelerator = self.accelerator
        # What is drawn is a function of seed, step and process, so a resumed run draws the same.
        set_seed(hash((self.seed, step, accelerator.process_index)) % 2**32)
        set_rates(self.schedule, step)
        share = len(micro_batches) * accelerator.num_processes
        counted = torch.stack([targets(batch["labels"], self.task) for batch in micro_batches]).sum()
        count = accelerator.reduce(counted.float(), "sum").clamp(min=1) / share
        parts: dict[str, Tensor] = {}
        bad: list[str] = []
        for batch in micro_batches:
            with accelerator.accumulate(self.objective):
                losses = self.objective(self.prepare(batch, step), count)
                accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    part = value.detach() / len(micro_batches)
                    parts[name] = parts[name] + part if name in parts else part
                if accelerator.sync_gradients:
                    average_replicated(accelerator, trained)
                    norm = accelerator.clip_grad_norm_(trained, math.inf if self.clip is None else self.clip)
                    if norm is not None:  # DeepSpeed's engine keeps it to itself
                        parts["gradient_norm"] = norm
                    parts = over_processes(accelerator, parts)
                    bad = not_finite(read(parts), self.scaled) if self.watched else []
                    if bad:
                        self.on_nonfinite(step, bad)
                # A loss scaler leaves out steps by itself, and has to be told of each.
                if not bad or self.scaled:
                    self.optimizer.step()
                self.optimizer.zero_grad()
        return None if bad else {**parts, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    @property
    def scaled(self) -> bool:
        """Whether a loss scaler is at work, as it is in fp16."""
        return self.accelerator.scaler is not None


def average_replicated(accelerator: Accelerator, trained: list[nn.Parameter]) -> None:
    """Averages the gradients of parameters that a sharded model holds whole in every process.

    FSDP leaves out the modules that it is told to ignore. The top-down module is one of them: all its maps
    are needed between the two passes, outside of the blocks that hold them.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    from torch.distributed.tensor import DTensor

    for parameter in trained:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes

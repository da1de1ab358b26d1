"""The order of samples: a function of seed and epoch, so that a run can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

#: What a data set is asked for: the epoch, which augmentation depends on, and the sample's index.
Key = tuple[int, int]


class EpochBatches(Sampler[list[Key]]):
    """Batches of one epoch, shuffled by seed and epoch.

    The last samples, too few for a step, are left out; in another order, others are.

    Args:
        count: Samples of the data set.
        batch_size: Samples of a micro-batch, over all processes.
        micro_batches: Micro-batches of a step.
        seed: Of the order.

    Raises:
        ValueError: If there are too few samples for one step.
    """

    drop_last = True

    def __init__(self, count: int, batch_size: int, micro_batches: int = 1, seed: int = 0) -> None:
        self.count = count
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.epoch = 0
        self.start = 0
        self.steps = count // (batch_size * micro_batches)
        if not self.steps:
            raise ValueError(
                f"batch_size: needs at most as many samples as the training split has, {count}; got "
                f"{batch_size * micro_batches}."
            )

    def choose(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and the step in it from which on batches are given."""
        self.epoch = epoch
        self.start = start

    def keys(self, step: int) -> list[Key]:
        """Returns the keys of all samples of a step of the run, over all micro-batches and processes."""
        epoch, at = divmod(step, self.steps)
        size = self.batch_size * self.micro_batches
        return [(epoch, row) for row in self._shuffled(epoch)[at * size : (at + 1) * size]]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        return torch.randperm(self.count, generator=generator).tolist()

    def __len__(self) -> int:
        """Micro-batches of the epoch that are still to come."""
        return (self.steps - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields a micro-batch's keys."""
        order = self._shuffled(self.epoch)
        for batch in range(self.start * self.micro_batches, self.steps * self.micro_batches):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, row) for row in rows]

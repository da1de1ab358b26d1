"""What the steps of a run are made on: micro-batches in their order, with what is stored of their samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from toast.data.vision.noting import Notes
from toast.training.cached_passes import Stored
from toast.training.data import Splits
from toast.training.finite import named_samples
from toast.training.order import EpochBatches
from toast.training.split_measures import refuse_bad
from toast.training.workers import batches as batches_of

Batch = dict[str, Any]


def training_loader(
    splits: Splits, order: EpochBatches, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Returns the loader of the training split, which Accelerate has to prepare.

    Args:
        splits: The data.
        order: Chooses the samples.
        workers: Processes that load data; they stay from epoch to epoch.
        device: Where the batches go.
    """
    return DataLoader(
        splits.train,
        batch_sampler=order,
        collate_fn=splits.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


class TrainingBatches:
    """The micro-batches of a run's steps.

    Args:
        splits: The data.
        order: Chooses the samples of each step.
        loader: Gives the micro-batches of the epoch that the order has chosen.
        stored: What is stored of the samples; None if nothing is.
        bad_share: Share of the training samples that may be unreadable.
        notes: Counts what is met in samples.
        say: Shows a line.

    Attributes:
        bad: Samples that could not be read: name and reason.
    """

    def __init__(
        self,
        splits: Splits,
        order: EpochBatches,
        loader: Any,
        stored: Stored | None,
        bad_share: float,
        notes: Notes,
        say: Callable[[str], None],
    ) -> None:
        self.splits = splits
        self.order = order
        self.loader = loader
        self.stored = stored
        self.bad_share = bad_share
        self.notes = notes
        self.say = say
        self.bad: dict[str, str] = {}

    def steps(self, start: int, total: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each step, epoch after epoch.

        Args:
            start: Steps that were made before.
            total: Steps of the run.
        """
        made = start
        while made < total:
            epoch, within = divmod(made, self.order.steps)
            self.order.choose(epoch, within)
            batches = batches_of(self.loader)
            end = min(total, (epoch + 1) * self.order.steps)
            for _ in range(made, end):
                yield list(itertools.islice(batches, self.order.micro_batches))
            made = end

    def complete(self, batch: Batch, step: int) -> Batch:
        """Counts what could not be read, and adds what is stored of a batch's samples.

        It is called for each micro-batch when it is needed, so that not all of a step are held at a time.

        Raises:
            ValueError: If more samples cannot be read than the share allows.
        """
        for name, reason in batch.pop("bad", []):
            if name not in self.bad:
                self.bad[name] = reason
                self.say(f"skipped {name}: {reason}")
        refuse_bad(self.bad, len(self.splits.train), "training", self.bad_share)
        for line in self.notes.add(batch.pop("notes", [])):
            self.say(line)
        return batch if self.stored is None else self.stored.complete(batch, step // self.order.steps)

    def names(self, step: int) -> list[str]:
        """Names the samples of a step, counted from 0: those with numbers that are not finite, or all."""
        return named_samples(self.splits.train, self.order.keys(step))

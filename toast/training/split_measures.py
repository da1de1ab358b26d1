"""Measures a model on a split: several processes share the samples, each sample counts once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from toast.training.answer_kinds import Answers
from toast.training.workers import batches as batches_of
from toast.visual.modes import evaluating
from toast.visual.targets import ATTENTION, is_known

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


@dataclass
class Measured:
    """What a split gave.

    Args:
        metrics: Figures by name; lists for those by class.
        predictions: A row a sample, if they were wanted; those of all processes.
        bad: Samples that could not be read: name and reason.
        notes: What was met in samples: name and what; see `toast.data.vision.noting`.
    """

    metrics: dict[str, Any]
    predictions: Rows
    bad: list[tuple[str, str]]
    notes: list[tuple[str, str]] = field(default_factory=list)

    def write_predictions(self, path: Path) -> None:
        """Writes the predictions as JSON lines, in the order of the samples."""
        from toast.evaluation.predictions import write_predictions

        write_predictions(path, sorted(self.predictions, key=lambda row: row["index"]))


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    objective: nn.Module,
    data: Any,
    collate: Callable[..., dict[str, Any]],
    *,
    answers: Answers,
    batch_size: int,
    workers: int = 0,
    name: str = "validation",
    predictions: bool = False,
    on_target: bool = False,
    bad_share: float = 0.0,
    stop: Callable[[], Any] = lambda: False,
) -> Measured | None:
    """Measures a model.

    Args:
        accelerator: What prepared the objective.
        objective: Gives logits with `predict=True`.
        data: A map-style data set.
        collate: Makes a batch of samples.
        answers: What the logits are held against.
        batch_size: Samples at a time, over all processes.
        workers: Processes that load data.
        name: Of the split, for the progress bar.
        predictions: Whether to keep each sample's prediction.
        on_target: Whether to measure attention and selection on targets, where the samples have one.
        bad_share: Share of the samples that may be unreadable and are left out.
        stop: Asked after each batch whether to give up.

    Returns:
        What was measured, the same figures in every process; None if it was given up.

    Raises:
        ValueError: If more samples than that share cannot be read.
    """
    # Each process takes its own samples, none twice: counts differ by one, and metrics are summed.
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    size = max(1, batch_size // accelerator.num_processes)
    loader = DataLoader(Subset(data, mine), batch_size=size, collate_fn=collate, num_workers=workers)
    steps = math.ceil(math.ceil(len(data) / accelerator.num_processes) / size)
    metrics = answers.metrics(accelerator.device)
    watcher = Watcher(accelerator.unwrap_model(objective).model) if on_target else None
    rows: Rows = []
    bad: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    batches = batches_of(loader)
    last: dict[str, Any] | None = None
    with evaluating(objective):
        for _ in tqdm(range(steps), name, unit="batch", leave=False, disable=not accelerator.is_main_process):
            # A process that has run out takes part in the calls of a sharded model with what it had last.
            batch = next(batches, None)
            fresh = batch is not None
            last = batch if batch is not None else last
            if last is None:
                last = collate([data[0]])
            bad += (batch or {}).get("bad", [])
            notes += (batch or {}).get("notes", [])
            held = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in last.items()}
            watched = watcher.on_target if watcher is not None and "target" in held else None
            with nullcontext() if watched is None else watched.watching() as seen:
                logits = objective(held, predict=True)
            if fresh:
                found = {} if watched is None else watched.measure(seen, held["target"])
                on_targets = (found, is_known(held["target"])) if found else ()
                metrics.update(logits, held["labels"], *on_targets)
                if predictions:
                    rows += _rows(answers.rows(logits, held["labels"]), held, found.get(ATTENTION))
            if stop():
                return None
    if accelerator.num_processes > 1:
        rows, bad = gather_object(rows), gather_object(bad)
    refuse_bad(dict(bad), len(data), name, bad_share)
    return Measured(metrics.compute(), rows, bad, notes)


def refuse_bad(bad: Mapping[str, str], total: int, split: str, share: float) -> None:
    """Refuses a split of which too much cannot be read.

    Args:
        bad: Samples that cannot be read: name and reason.
        total: Samples of the split.
        split: Its name.
        share: What may be unreadable.

    Raises:
        ValueError: If more is; it names the first.
    """
    if len(bad) > share * total:
        name, reason = next(iter(bad.items()))
        raise ValueError(
            f"data: {len(bad)} of {total} {split} images cannot be read, first {name} ({reason}); "
            f"data.bad_share={share} allows {share * total:.0f}. Fix or remove them, or allow more."
        )


class Watcher:
    """Makes what measures on targets when the first target comes: many splits have none, others have few.

    Args:
        model: The model that is measured.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def on_target(self) -> Any:
        """What measures; None, with a remark, if the model has no map of attention."""
        from toast.training.on_target import LastBlockWatcher

        try:
            return LastBlockWatcher(self.model)
        except ValueError as error:
            logger.warning("attention on target is not measured: %s", error)
            return None


def _rows(made: Sequence[dict[str, Any] | None], batch: dict[str, Any], shares: Tensor | None) -> Rows:
    """Returns the predictions of the samples that count, with their numbers and what falls on targets."""
    rows: Rows = []
    on_target = [None] * len(made) if shares is None else shares.tolist()
    for row, index, share in zip(made, batch["index"].tolist(), on_target, strict=True):
        if row is None:  # what stands in for a batch of which nothing could be read
            continue
        rows.append({"index": index, **row})
        if share is not None:
            rows[-1]["attention_on_target"] = None if math.isnan(share) else round(share, 6)
    return rows

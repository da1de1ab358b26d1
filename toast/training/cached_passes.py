"""Decides whether a run stores the first pass, and hands each batch what was stored of its samples."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from toast.training.accelerating import loads_in_main
from toast.training.answer_kinds import IGNORED
from toast.training.frozen_features import Computer, build, settings_of, weights_of, why_not
from toast.training.preparing import Prepared, Stage
from toast.training.run_config import RunConfig
from toast.training.tensor_store import Store

Batch = dict[str, Any]
logger = logging.getLogger(__name__)


class Stored:
    """Completes batches from a store.

    Args:
        store: The tensors by sample; variants of a sample stand one split's length apart.
        compute: What made them.
        count: Samples of the training split.
        views: Variants of each.
        device: Where the batches are.
    """

    def __init__(self, store: Store, compute: Computer, count: int, views: int, device: torch.device) -> None:
        self.store = store
        self.compute = compute
        self.count = count
        self.views = views
        self.device = device

    def complete(self, batch: Batch, epoch: int) -> Batch:
        """Returns a batch with the tensors of its samples.

        Raises:
            ValueError: If one of them could not be read while they were stored, and can be by now.
        """
        view = epoch % self.views
        rows = [view * self.count + index for index in batch["index"].tolist()]
        if self.store.unread:
            # One that does not count stands in for a batch without a sample; others of a batch do.
            labels = batch["labels"]
            counted = ~labels.isnan().any(-1) if labels.is_floating_point() else labels != IGNORED
            late = [row for row, counts in zip(rows, counted.tolist(), strict=True) if counts]
            late = sorted(self.store.unread.intersection(late))
            if late:
                raise ValueError(
                    f"first_pass: training sample {late[0] % self.count} could not be read while the first "
                    "pass was stored, and can be now. Continue with --resume, which computes it."
                )
        tensors: dict[str, Tensor] = self.store.read(rows)
        return self.compute.complete(
            batch, {n: t.to(self.device, non_blocking=True) for n, t in tensors.items()}
        )


def stored_first_pass(
    config: RunConfig,
    stage: Stage,
    accelerator: Accelerator,
    prepared: Prepared,
    say: Callable[[str], None] = logger.info,
) -> Stored | None:
    """Stores the first pass of the training split, if the configuration wants it.

    Raises:
        ValueError: If it is wanted and the losses would not be those of a run that computes it.
    """
    if config.first_pass.mode == "computed":
        return None
    if loads_in_main(accelerator):
        what = "fsdp_cpu_ram_efficient_loading leaves the backbone's weights to the main process"
        if config.first_pass.mode == "cached":
            raise ValueError(
                f"first_pass: all processes store it, and {what}. Set it to false in the file for accelerate "
                "launch, or first_pass.mode=computed."
            )
        say(f"first pass: computed in every step, for {what}")
        return None
    reasons = _reasons(config, stage, prepared)
    if reasons and config.first_pass.mode == "cached":
        raise ValueError(
            "first_pass: what is stored would differ from what is computed:\n  " + "\n  ".join(reasons)
        )
    if reasons:
        say("first pass: computed in every step, for what is stored would differ: " + "; ".join(reasons))
        return None
    model, splits = prepared.method.model, prepared.splits
    views, count = config.augment.views or 1, len(splits.train)
    at, fingerprint = place_of(config, accelerator, prepared)
    compute = Computer(model.to(accelerator.device), prepared.backbone, prepared.head)

    def samples(rows: range) -> tuple[Batch | None, list[int]]:
        items = [splits.train[row // count, row % count] for row in rows]
        good = [place for place, item in enumerate(items) if "bad" not in item]
        return (splits.collate([items[place] for place in good]) if good else None), good

    lengths = None if splits.lengths is None else splits.lengths * views
    limit = config.first_pass.limit if config.first_pass.mode == "auto" else None
    store = build(at, fingerprint, compute, samples, lengths, count * views, accelerator, say, limit)
    return None if store is None else Stored(store, compute, count, views, accelerator.device)


def place_of(config: RunConfig, accelerator: Accelerator, prepared: Prepared) -> tuple[Path, dict[str, Any]]:
    """Returns the folder that the first pass of the training split is stored in, and what it is made of."""
    model, views = prepared.method.model, config.augment.views or 1
    fingerprint = {
        "backbone": weights_of(model),
        "data": prepared.splits.fingerprint,
        "settings": settings_of(model),
        "precision": [accelerator.mixed_precision, config.model.dtype],
        "views": [views, config.seed if views > 1 else None],
    }
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return (config.first_pass.folder or config.out / "first-pass") / name, fingerprint


def _reasons(config: RunConfig, stage: Stage, prepared: Prepared) -> list[str]:
    if stage == "pretune":
        return ["pre-tuning measures the task loss on the first pass's output, which is not stored"]
    reason = config.method.row.why_not_stored(config.task)
    if reason is not None:
        return [f"{config.method.name}: {reason}"]
    augmented = config.task == "vision" and config.augment.preset != "none"
    return why_not(prepared.method.model, prepared.head, augmented, config.augment.views)

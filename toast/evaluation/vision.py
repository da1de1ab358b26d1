"""Measures of a classifier, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from toast.evaluation.aggregation import IGNORED, Average, joining
from toast.visual.targets import ATTENTION, INSIDE, OUTSIDE, RATIO, ratio

#: Bins of confidence of the calibration error.
BINS = 15


class VisionMetrics:
    """Accuracy, calibration, and attention and selection on targets, of a classifier.

    Processes of torch.distributed are joined in `compute`, whatever samples each has seen. Samples that only
    fill up a batch are left out by the label -100.

    Args:
        classes: Number of classes.
        device: Where logits will be.

    Raises:
        ValueError: If there are fewer than 2 classes.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassCalibrationError,
            MulticlassConfusionMatrix,
        )

        if classes < 2:
            raise ValueError(f"classes: needs at least 2; got {classes}.")
        self.classes = classes
        options: dict[str, Any] = {"num_classes": classes, "ignore_index": IGNORED}
        measures: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(top_k=1, average="micro", **options),
            "confusion": MulticlassConfusionMatrix(**options),
            "calibration_error": MulticlassCalibrationError(n_bins=BINS, norm="l1", **options),
        }
        if classes >= 5:
            measures["top5_accuracy"] = MulticlassAccuracy(top_k=5, average="micro", **options)
        self.measures = MetricCollection(measures).to(device)
        self.loss = Average(device)
        self.on_target = {name: Average(device) for name in (ATTENTION, INSIDE, OUTSIDE)}
        self.sight = Average(device)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        on_target: Mapping[str, Tensor] | None = None,
        has_target: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            logits: `(batch, classes)`.
            labels: `(batch,)`; -100 leaves the sample out.
            on_target: What `toast.visual.targets.measure` gives, by its names, `(batch,)` each; not a number
                where no target is in sight.
            has_target: Which samples have a target, in sight or not, `(batch,)`; None is those that were
                measured.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if logits.ndim != 2 or logits.shape[1] != self.classes or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"logits, labels: need shapes (batch, {self.classes}) and (batch,); "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        on_target = on_target or {}
        for name, values in on_target.items():
            if values.shape != labels.shape:
                raise ValueError(f"{name}: needs shape {tuple(labels.shape)}; got {tuple(values.shape)}.")
        counted = labels != IGNORED
        if not counted.any():
            return
        logits, labels = logits.detach()[counted], labels[counted]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # As probabilities: logits that happen to lie between 0 and 1 would be taken for such.
        self.measures.update(logits.softmax(-1), labels)
        self.loss.update(cross_entropy(logits, labels, reduction="none"))
        for name, values in on_target.items():
            held = values.detach().to(labels.device)[counted]
            self.on_target[name].update(held[~held.isnan()])
        if ATTENTION in on_target:
            seen = ~on_target[ATTENTION].to(labels.device).isnan()[counted]
            known = seen if has_target is None else has_target.to(labels.device)[counted]
            self.sight.update(seen[known].float())

    def compute(self) -> dict[str, Any]:
        """Returns the measures of all samples of all processes.

        Returns:
            By name:

            - `samples`: how many had a label;
            - `loss`: mean cross-entropy in nats;
            - `accuracy`, and with 5 classes or more `top5_accuracy`, 0 to 1;
            - `class_accuracy`: by class, None for a class without samples;
            - `mean_class_accuracy`: mean over the classes with samples;
            - `calibration_error`: expected calibration error over 15 bins (arXiv 1706.04599), 0 to 1;
            - `confusion`: counts, a row for each label, a column for each prediction;
            - `targets_in_sight`, `targets_out_of_sight`: how many samples have a target that the picture
              shows, and how many one that its preparation has cropped away; if any has one. What follows is
              over the former, if there are any:
            - `attention_on_target`: mean share of the attention on the target, 0 to 1;
            - `selection_inside`, `selection_outside`: mean selection weight of the tokens on the target and
              of the others, 0 to 1, of a model that selects; `selection_ratio`, that of the two means
              (`toast.visual.targets.ratio`), if the latter is not 0.

        Raises:
            ValueError: If no process has seen a labelled sample.
        """
        with joining():
            loss, samples = self.loss.compute()
            means = {name: metric.compute() for name, metric in self.on_target.items()}
            sight, targets = self.sight.compute()
            if not samples:
                raise ValueError("no sample with a label was measured; needs at least one.")
            found = {name: value.cpu() for name, value in self.measures.compute().items()}
        confusion = found.pop("confusion").long()
        hits = (confusion.diagonal() / confusion.sum(1)).tolist()
        seen = confusion.sum(1) > 0
        by_class = [hit if has else None for hit, has in zip(hits, seen.tolist(), strict=True)]
        measures = {
            "samples": int(samples),
            "loss": float(loss),
            **{name: float(value) for name, value in found.items()},
            "class_accuracy": by_class,
            "mean_class_accuracy": float((confusion.diagonal() / confusion.sum(1))[seen].mean()),
            "confusion": confusion.tolist(),
        }
        return measures | (_of_targets(means, round(float(sight * targets)), int(targets)) if targets else {})

    def reset(self) -> None:
        """Forgets all samples."""
        self.measures.reset()
        for average in (self.loss, self.sight, *self.on_target.values()):
            average.reset()


def _of_targets(means: Mapping[str, tuple[Tensor, Tensor]], seen: int, targets: int) -> dict[str, Any]:
    """Returns the figures on targets: means of what has values, and how many targets there were."""
    held = {name: float(mean) for name, (mean, count) in means.items() if count}
    found = ratio(held)
    counts = {"targets_in_sight": seen, "targets_out_of_sight": targets - seen}
    return counts | held | ({} if found is None else {RATIO: found})

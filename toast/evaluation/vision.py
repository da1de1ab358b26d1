"""Measures of a classifier, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from toast.evaluation.aggregation import IGNORED, Average, joining
from toast.evaluation.target_means import TargetMeans

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
        self.targets = TargetMeans(device)

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
        counted = labels != IGNORED
        self.targets.update(on_target or {}, has_target, counted)
        if not counted.any():
            return
        logits, labels = logits.detach()[counted], labels[counted]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # As probabilities: logits that happen to lie between 0 and 1 would be taken for such.
        self.measures.update(logits.softmax(-1), labels)
        self.loss.update(cross_entropy(logits, labels, reduction="none"))

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
            on_target = self.targets.compute()
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
        return measures | on_target

    def reset(self) -> None:
        """Forgets all samples."""
        self.measures.reset()
        self.loss.reset()
        self.targets.reset()

"""What a model's outputs are held against: the loss, what is measured, how predictions are written.

A run without heads has one label a picture (`ClassAnswers`), or predicts the next token (`TokenAnswers`);
heads that a configuration names are in `toast.training.target_kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from toast.evaluation.choosing import CHOOSING

#: Label of what does not count, where labels are whole numbers; where they are not it is NaN.
IGNORED = -100
#: Most probable classes that a prediction holds.
TOP = 5


class Answers(ABC):
    """What a model's outputs are held against.

    Attributes:
        measures: Figures that can choose the best of several measurements.
        chooses: The one that does unless something else is set.
        outputs: Outputs of the head; None leaves it to the model.
    """

    measures: ClassVar[tuple[str, ...]]
    chooses: ClassVar[str]
    outputs: int | None

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum of the losses over what counts, `()`."""

    @abstractmethod
    def counted(self, labels: Tensor) -> Tensor:
        """Returns how many terms that sum has, `()`."""

    @abstractmethod
    def metrics(self, device: torch.device) -> Any:
        """Returns what measures: `update(logits, labels, on_target, has_target)`, `compute()`."""

    def rows(self, logits: Tensor, labels: Tensor) -> list[dict[str, Any] | None]:
        """Returns the prediction of each sample as JSON has it; None of one that does not count."""
        return [None] * len(labels)

    def record(self) -> Any:
        """Returns what `labels.json` holds: enough to make this again."""
        return []


class TokenAnswers(Answers):
    """The next token, at every place of a text."""

    measures = CHOOSING["language"]
    chooses = "loss"
    outputs = None

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(batch, tokens, vocabulary)`, each for the next of the labels `(batch, tokens)`."""
        return _cross_entropy(logits[:, :-1], labels[:, 1:], self.smoothing)

    def counted(self, labels: Tensor) -> Tensor:
        """Counts tokens that are predicted."""
        return (labels[:, 1:] != IGNORED).sum()

    def metrics(self, device: torch.device) -> Any:
        """Measures loss, perplexity and accuracy of tokens."""
        from toast.evaluation.language import LanguageMetrics

        return Converted(LanguageMetrics(device), lambda logits, labels: (logits[:, :-1], labels[:, 1:]))


class ClassAnswers(Answers):
    """One of several classes.

    Args:
        names: Names of the classes.
        smoothing: Of the labels.
    """

    measures = CHOOSING["vision"]
    chooses = "accuracy"

    def __init__(self, names: Sequence[str], smoothing: float = 0.0) -> None:
        self.names = tuple(names)
        self.smoothing = smoothing
        self.outputs: int = len(self.names)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(batch, classes)`, labels int64 `(batch,)`."""
        return _cross_entropy(logits, labels, self.smoothing)

    def counted(self, labels: Tensor) -> Tensor:
        """Counts samples."""
        return (labels != IGNORED).sum()

    def metrics(self, device: torch.device) -> Any:
        """Measures accuracy, calibration, confusion."""
        from toast.evaluation.vision import VisionMetrics

        return VisionMetrics(len(self.names), device)

    def rows(self, logits: Tensor, labels: Tensor) -> list[dict[str, Any] | None]:
        """See `Answers.rows`."""
        best = logits.float().softmax(-1).cpu().topk(min(TOP, len(self.names)))
        return [
            None
            if label == IGNORED
            else {
                "label": self.names[label],
                "predicted": self.names[int(places[0])],
                "probabilities": {
                    self.names[int(c)]: round(float(p), 6) for c, p in zip(places, values, strict=True)
                },
            }
            for label, places, values in zip(labels.tolist(), best.indices, best.values, strict=True)
        ]

    def record(self) -> list[str]:
        """See `Answers.record`."""
        return list(self.names)


class Converted:
    """Measures of logits and labels that are converted first.

    Args:
        metrics: What measures.
        convert: Maps logits and labels to what it takes.
    """

    def __init__(self, metrics: Any, convert: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.metrics = metrics
        self.convert = convert

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self.metrics.update(*self.convert(logits, labels))

    def compute(self) -> dict[str, Any]:
        """Returns the measures."""
        return self.metrics.compute()  # type: ignore[no-any-return]


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )

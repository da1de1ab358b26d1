"""The heads that a configuration names: one linear head whose outputs are those of all, beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toast.data.fields import Fields
from toast.training.answer_kinds import Answers, ClassAnswers, TokenAnswers
from toast.training.head_config import HeadConfig
from toast.training.run_config import RunConfig
from toast.training.target_kinds import KINDS, ClassTarget, Target


class Heads(Answers):
    """Answers of one or several heads on one backbone.

    Several linear maps of the same features are one with their outputs beside each other, so the model has
    one head, and every method, adapter and stored first pass is as without heads. Labels are float
    `(batch, columns)`, those of the heads beside each other.

    Args:
        targets: The heads by name.
        smoothing: Of class labels.
    """

    def __init__(self, targets: Mapping[str, Target], smoothing: float = 0.0) -> None:
        self.targets = dict(targets)
        for target in self.targets.values():
            if isinstance(target, ClassTarget):
                target.smoothing = smoothing
        self.outputs: int = sum(target.outputs for target in self.targets.values())

    @classmethod
    def fit(cls, heads: Mapping[str, HeadConfig], train: Fields | None, smoothing: float = 0.0) -> Heads:
        """Makes the heads from the targets of the training split.

        Raises:
            ValueError: If a column is missing, or its values are not what the head needs.
        """
        made = {
            name: KINDS[head.kind].fit(name, head, *_values(name, head, train))
            for name, head in heads.items()
        }
        return cls(made, smoothing)

    def encode(self, fields: Fields | None) -> Tensor:
        """Returns the labels of a split's samples, float32 `(samples, columns)`.

        Raises:
            ValueError: As `fit`, or a class or label is none of the training split's.
        """
        columns = []
        for name, target in self.targets.items():
            values, places = _values(name, target.config, fields)
            rows = [target.encode(each, place) for each, place in zip(values, places, strict=True)]
            columns.append(torch.tensor(rows, dtype=torch.float32).view(len(rows), target.columns))
        return torch.cat(columns, 1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the weighted sum of the heads' losses."""
        losses = [
            target.config.weight * target.loss(*part) for _, target, *part in self.parts(logits, labels)
        ]
        return torch.stack(losses).sum()

    def counted(self, labels: Tensor) -> Tensor:
        """Counts samples."""
        return (~labels.isnan().any(-1)).sum()

    def metrics(self, device: torch.device) -> Any:
        """Measures all heads; figures of several have the head's name and a dot before theirs."""
        return HeadMetrics(self, device)

    def rows(self, logits: Tensor, labels: Tensor) -> list[dict[str, Any] | None]:
        """See `Answers.rows`; by head."""
        by_head = {name: target.rows(*part) for name, target, *part in self.parts(logits, labels)}
        made: list[dict[str, Any] | None] = []
        for each in zip(*by_head.values(), strict=True):
            held = dict(zip(by_head, each, strict=True))
            keys = ("label", "predicted", "probabilities")
            made.append(
                None
                if None in each
                else {key: {name: row[key] for name, row in held.items() if row} for key in keys}
            )
        return made

    def record(self) -> dict[str, Any]:
        """See `Answers.record`; by head."""
        return {name: target.record() for name, target in self.targets.items()}

    def captions(self, logits: Tensor, labels: Tensor) -> list[str]:
        """Returns, of one sample, what each head says and what its target is."""
        row = self.rows(logits[None], labels[None])[0]
        if row is None:
            return []
        return [
            f"{name}: {_short(row['predicted'][name])} (is {_short(row['label'][name])})"
            for name in self.targets
        ]

    def parts(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[str, Target, Tensor, Tensor]]:
        """Yields each head's name, and its part of outputs and labels."""
        output = column = 0
        for name, target in self.targets.items():
            yield (
                name, target, logits[:, output : output + target.outputs],
                labels[:, column : column + target.columns],
            )  # fmt: skip
            output, column = output + target.outputs, column + target.columns

    def called(self, head: str, measure: str) -> str:
        """Returns what a head's figure is called."""
        return measure if len(self.targets) == 1 else f"{head}.{measure}"


class HeadMetrics:
    """Measures of all heads, over all processes.

    Args:
        heads: The heads.
        device: Where logits will be.
    """

    def __init__(self, heads: Heads, device: torch.device) -> None:
        from toast.evaluation.target_means import TargetMeans

        self.heads = heads
        self.metrics = {name: target.metrics(device) for name, target in heads.targets.items()}
        self.on_target = TargetMeans(device)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        on_target: Mapping[str, Tensor] | None = None,
        has_target: Tensor | None = None,
    ) -> None:
        """Adds a batch; see `toast.evaluation.vision.VisionMetrics.update`."""
        for name, _, *part in self.heads.parts(logits, labels):
            self.metrics[name].update(*part)
        self.on_target.update(on_target or {}, has_target, ~labels.isnan().any(-1))

    def compute(self) -> dict[str, Any]:
        """Returns the figures of all heads, their weighted `loss`, and what is measured on targets."""
        from toast.evaluation.aggregation import joining

        by_head = {name: metrics.compute() for name, metrics in self.metrics.items()}
        samples = {found.pop("samples") for found in by_head.values()}
        weights = {name: target.config.weight for name, target in self.heads.targets.items()}
        loss = sum(weights[name] * found["loss"] for name, found in by_head.items())
        figures = {
            self.heads.called(name, measure): value
            for name, found in by_head.items()
            for measure, value in found.items()
        }
        with joining():
            return {"samples": max(samples), **figures, "loss": loss, **self.on_target.compute()}


def choosing_of(config: RunConfig) -> str:
    """Returns the figure that chooses where none is set: of several heads the weighted loss."""
    if len(config.heads) == 1:
        return next(KINDS[head.kind].chooses for head in config.heads.values())
    if config.heads:
        return "loss"
    return (ClassAnswers if config.task == "vision" else TokenAnswers).chooses


def answers_of(config: RunConfig, record: Any) -> Answers:
    """Returns what a run's outputs are held against.

    Args:
        config: The run's configuration.
        record: What `Answers.record` gave; without heads, the names of the classes.
    """
    smoothing = config.label_smoothing
    if config.heads:
        targets = {n: KINDS[head.kind](n, head, record[n]) for n, head in config.heads.items()}
        return Heads(targets, smoothing)
    return ClassAnswers(record, smoothing) if config.task == "vision" else TokenAnswers(smoothing)


def _values(
    name: str, head: HeadConfig, fields: Fields | None
) -> tuple[Sequence[tuple[Any, ...]], Sequence[str]]:
    known = {} if fields is None else fields.columns
    wanted = head.columns or [name]
    lacking = [column for column in wanted if column not in known]
    if lacking or fields is None:
        has = f"has {', '.join(known)}" if known else "has no columns of targets"
        raise ValueError(
            f"heads.{name}: needs the column {', '.join(lacking)}; the data {has}. Name others with "
            f"heads.{name}.columns."
        )
    return list(zip(*(known[column] for column in wanted), strict=True)), fields.places


def _short(answer: Any) -> str:
    if isinstance(answer, dict):
        return ", ".join(f"{name} {_short(value)}" for name, value in answer.items())
    if isinstance(answer, list):
        return ", ".join(answer) or "none"
    return f"{answer:.4g}" if isinstance(answer, float) else str(answer)

"""Kinds of targets of heads, a class each: how they are read, the loss, what is measured, how they are shown.

`KINDS` is the table. Labels are columns of numbers, NaN in what stands in for a sample that cannot be read.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from toast.training.answer_kinds import IGNORED, TOP, Answers, ClassAnswers, Converted
from toast.training.head_config import HeadConfig

#: Names that a message lists.
_SHOWN = 5


class Target(Answers):
    """Answers of one head that a configuration names; its labels are columns of numbers.

    Args:
        name: The head's name.
        config: Its settings.
        record: What `fit` found of the training split.
    """

    def __init__(self, name: str, config: HeadConfig, record: dict[str, Any]) -> None:
        self.name = name
        self.config = config
        self.held = record
        self.names = tuple(record["outputs"])
        self.outputs: int = len(self.names)

    @classmethod
    def fit(
        cls, name: str, config: HeadConfig, values: Sequence[tuple[Any, ...]], places: Sequence[str]
    ) -> Self:
        """Makes the head from the targets of the training split: one tuple a sample, a value a column.

        Raises:
            ValueError: If they are none of this kind, or there is nothing to learn.
        """
        if config.loss is not None and cls is not RegressionTarget:
            raise ValueError(f"heads.{name}.loss: belongs to regression; the kind is {config.kind}.")
        if len(config.columns or ()) > 1 and cls is not RegressionTarget:
            raise ValueError(
                f"heads.{name}.columns: {config.kind} has one; got {', '.join(config.columns or ())}."
            )
        return cls(name, config, cls.learn(name, config, values, places))

    @classmethod
    @abstractmethod
    def learn(
        cls, name: str, config: HeadConfig, values: Sequence[tuple[Any, ...]], places: Sequence[str]
    ) -> dict[str, Any]:
        """Returns what has to be known of the training split: `outputs`, their names, and more."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Numbers that its labels have."""

    @abstractmethod
    def encode(self, values: tuple[Any, ...], place: str) -> list[float]:
        """Returns a sample's labels.

        Raises:
            ValueError: If they are none of this kind.
        """

    @abstractmethod
    def told(self, labels: Tensor) -> Any:
        """Returns labels `(columns,)` as they stand in the data."""

    @abstractmethod
    def answer(self, logits: Tensor) -> tuple[Any, dict[str, float]]:
        """Returns the prediction of logits `(outputs,)`, as `told` says it, and probabilities by name."""

    def rows(self, logits: Tensor, labels: Tensor) -> list[dict[str, Any] | None]:
        """See `Answers.rows`."""
        made: list[dict[str, Any] | None] = []
        for each, label in zip(logits.float().cpu(), labels.cpu(), strict=True):
            predicted, probabilities = self.answer(each)
            row = {"label": self.told(label), "predicted": predicted, "probabilities": probabilities}
            made.append(None if label.isnan().any() else row)
        return made

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each sample, all of which count, `(batch,)`.

        Args:
            logits: `(batch, outputs)`.
            labels: `(batch, columns)`.
        """

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Answers.loss`."""
        counted = ~labels.isnan().any(-1)
        return self.losses(logits[counted].float(), labels[counted]).sum()

    def counted(self, labels: Tensor) -> Tensor:
        """Counts samples."""
        return (~labels.isnan().any(-1)).sum()

    def record(self) -> dict[str, Any]:
        """See `Answers.record`."""
        return {"kind": self.config.kind, **self.held}


class ClassTarget(Target):
    """One of several classes, by name; the classes are those of the training split."""

    measures = ClassAnswers.measures[:5]
    chooses = ClassAnswers.chooses
    columns = 1
    smoothing = 0.0

    @classmethod
    def learn(
        cls, name: str, config: HeadConfig, values: Sequence[tuple[Any, ...]], places: Sequence[str]
    ) -> dict[str, Any]:
        """See `Target.learn`."""
        held = sorted({_text(name, value, place) for (value,), place in zip(values, places, strict=True)})
        if len(held) < 2:
            raise ValueError(
                f"heads.{name}: needs two classes or more; all training samples are {held[0]!r}."
            )
        return {"outputs": held}

    @property
    def plain(self) -> ClassAnswers:
        """The same for labels that are whole numbers."""
        return ClassAnswers(self.names, self.smoothing)

    def encode(self, values: tuple[Any, ...], place: str) -> list[float]:
        """See `Target.encode`."""
        return [float(_place_in(self.names, _text(self.name, values[0], place), self.name, place))]

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Target.losses`."""
        return F.cross_entropy(logits, _whole(labels), label_smoothing=self.smoothing, reduction="none")

    def metrics(self, device: torch.device) -> Any:
        """Measures accuracy, calibration, confusion."""
        metrics = self.plain.metrics(device)
        return Converted(metrics, lambda logits, labels: (logits, _whole(labels)))

    def told(self, labels: Tensor) -> Any:
        """See `Target.told`."""
        return None if labels.isnan().any() else self.names[int(labels)]

    def answer(self, logits: Tensor) -> tuple[Any, dict[str, float]]:
        """See `Target.answer`."""
        best = logits.softmax(-1).topk(min(TOP, len(self.names)))
        shares = {self.names[int(c)]: round(float(p), 6) for p, c in zip(*best, strict=True)}
        return next(iter(shares)), shares


class RegressionTarget(Target):
    """Numbers; the head predicts them in standard deviations from the training split's mean."""

    measures = ("r2", "mae", "loss")
    chooses = "r2"

    def __init__(self, name: str, config: HeadConfig, record: dict[str, Any]) -> None:
        super().__init__(name, config, record)
        self.mean, self.deviation = torch.tensor(record["mean"]), torch.tensor(record["deviation"])

    @classmethod
    def learn(
        cls, name: str, config: HeadConfig, values: Sequence[tuple[Any, ...]], places: Sequence[str]
    ) -> dict[str, Any]:
        """See `Target.learn`."""
        rows = [_numbers(name, each, place) for each, place in zip(values, places, strict=True)]
        numbers = torch.tensor(rows, dtype=torch.float64)
        mean, deviation = numbers.mean(0), numbers.std(0, correction=0)
        if not (deviation > 0).all():
            raise ValueError(f"heads.{name}: needs numbers that differ; all training samples have {rows[0]}.")
        return {
            "outputs": config.columns or [name],
            "mean": mean.tolist(),
            "deviation": deviation.tolist(),
        }

    @property
    def columns(self) -> int:
        """See `Target.columns`."""
        return self.outputs

    def encode(self, values: tuple[Any, ...], place: str) -> list[float]:
        """See `Target.encode`."""
        return _numbers(self.name, values, place)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Target.losses`; the mean over the columns."""
        wanted = (labels - self.mean.to(labels)) / self.deviation.to(labels)
        measure = F.huber_loss if self.config.loss == "huber" else F.mse_loss
        return measure(logits, wanted, reduction="none").mean(-1)

    def metrics(self, device: torch.device) -> Any:
        """Measures R² and the mean absolute error."""
        from toast.evaluation.regression import RegressionMetrics

        return RegressionMetrics(self.mean, self.deviation, self.losses, device)

    def told(self, labels: Tensor) -> Any:
        """See `Target.told`."""
        values = [float(f"{value:.6g}") for value in labels.tolist()]
        return values[0] if len(values) == 1 else dict(zip(self.names, values, strict=True))

    def answer(self, logits: Tensor) -> tuple[Any, dict[str, float]]:
        """See `Target.answer`."""
        return self.told(logits * self.deviation + self.mean), {}


class MultilabelTarget(Target):
    """Any number of several labels; they are those of the training split."""

    measures = ("mean_average_precision", "loss")
    chooses = "mean_average_precision"

    @classmethod
    def learn(
        cls, name: str, config: HeadConfig, values: Sequence[tuple[Any, ...]], places: Sequence[str]
    ) -> dict[str, Any]:
        """See `Target.learn`."""
        held = [_labels(name, value, place) for (value,), place in zip(values, places, strict=True)]
        known = sorted(set().union(*held))
        if not known:
            raise ValueError(
                f"heads.{name}: no training sample has a label; needs names with ';' between them."
            )
        everywhere = [label for label in known if all(label in each for each in held)]
        if everywhere:
            raise ValueError(
                f"heads.{name}: every training sample is labelled {everywhere[0]!r}, which leaves nothing to "
                "tell apart. Leave that label out."
            )
        return {"outputs": known}

    @property
    def columns(self) -> int:
        """See `Target.columns`."""
        return self.outputs

    def encode(self, values: tuple[Any, ...], place: str) -> list[float]:
        """See `Target.encode`."""
        row = [0.0] * self.outputs
        for label in _labels(self.name, values[0], place):
            row[_place_in(self.names, label, self.name, place)] = 1.0
        return row

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Target.losses`; the mean over the labels."""
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    def metrics(self, device: torch.device) -> Any:
        """Measures the mean average precision."""
        from toast.evaluation.multilabel import MultilabelMetrics

        return MultilabelMetrics(self.outputs, self.losses, device)

    def told(self, labels: Tensor) -> Any:
        """See `Target.told`."""
        return [name for name, has in zip(self.names, (labels > 0.5).tolist(), strict=True) if has]

    def answer(self, logits: Tensor) -> tuple[Any, dict[str, float]]:
        """See `Target.answer`."""
        shares = logits.sigmoid()
        return self.told(shares), {n: round(p, 6) for n, p in zip(self.names, shares.tolist(), strict=True)}


#: The kinds by the names that configurations have for them.
KINDS: dict[str, type[Target]] = {
    "classes": ClassTarget,
    "regression": RegressionTarget,
    "multilabel": MultilabelTarget,
}


def measures_of(heads: Mapping[str, HeadConfig]) -> tuple[str, ...]:
    """Returns the figures of configured heads that can choose the best of several measurements."""
    own = {name: KINDS[head.kind].measures for name, head in heads.items()}
    if len(own) == 1:
        return next(iter(own.values()))
    return ("loss", *(f"{name}.{measure}" for name, known in own.items() for measure in known))


def _whole(labels: Tensor) -> Tensor:
    return labels[:, 0].nan_to_num(IGNORED).long()


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _text(name: str, value: Any, place: str) -> str:
    if _is_missing(value) or isinstance(value, list | dict):
        raise ValueError(f"{place}: heads.{name} needs the name of a class; got {value!r}.")
    return str(value)


def _numbers(name: str, values: tuple[Any, ...], place: str) -> list[float]:
    found = []
    for value in values:
        try:
            number = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{place}: heads.{name} needs a finite number; got {value!r}.")
        found.append(number)
    return found


def _labels(name: str, value: Any, place: str) -> set[str]:
    if isinstance(value, str):
        return {label.strip() for label in value.split(";") if label.strip()}
    if isinstance(value, list) and all(isinstance(label, str | int) and label != "" for label in value):
        return {str(label) for label in value}
    raise ValueError(f"{place}: heads.{name} needs labels with ';' between them, or a list; got {value!r}.")


def _place_in(names: tuple[str, ...], value: str, head: str, place: str) -> int:
    if value not in names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(
            f"{place}: heads.{head} needs one of the training split's {len(names)} labels "
            f"({', '.join(names[:_SHOWN])}{more}); got {value!r}."
        )
    return names.index(value)

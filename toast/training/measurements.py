"""What a run measures: the validation split on its way, the other splits at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from toast.data.vision.noting import Notes
from toast.training import folder
from toast.training.config import RunConfig
from toast.training.data import Splits
from toast.training.evaluate import Measured, evaluate


class Measurements:
    """The measurements of one run.

    Args:
        accelerator: What prepared the objective.
        objective: Gives logits with `predict=True`.
        splits: The data.
        config: The run's configuration.
        epoch: Steps of an epoch.
        total: Steps of the run.
        notes: Counts what is met in samples.
        say: Shows a line.
        wish: Whether the run is asked to stop, which gives a measurement up.

    Attributes:
        validation: The last figures of the validation split; None if there are none.
        validated: The step that they are of; -1 before the first.
        unread: Samples that could not be read: name and reason.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        splits: Splits,
        config: RunConfig,
        epoch: int,
        total: int,
        notes: Notes,
        say: Callable[[str], None],
        wish: Callable[[], int],
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.splits = splits
        self.config = config
        self.place: Path = config.folder
        self.epoch = epoch
        self.total = total
        self.notes = notes
        self.say = say
        self.wish = wish
        self.validation: dict[str, Any] | None = None
        self.validated = -1
        self.unread: dict[str, str] = {}

    def validate_if_due(self, step: int) -> None:
        """Measures at the end of a run, and of every so many epochs; once."""
        epochs, rest = divmod(step, self.epoch)
        every = self.config.evaluation.every
        if self.validated != step and (
            step == self.total or (step and not rest and every and epochs % every == 0)
        ):
            self.validate(step)

    def validate(self, step: int) -> None:
        """Measures on the validation split, if there is one."""
        measured = self.measure(self.splits.validation, "validation")
        if measured is None and self.splits.validation is not None:
            return  # a signal came: a resumed run measures
        self.validated = step
        if measured is None:
            return
        self.validation = measured.metrics
        scalars = {name: value for name, value in measured.metrics.items() if isinstance(value, float)}
        epoch = round(step / self.epoch, 4)
        if self.accelerator.is_main_process:
            row = {"step": step, "epoch": epoch, "split": "validation", **scalars}
            folder.append_metrics(self.place, row)
        self.accelerator.log({f"validation/{name}": value for name, value in scalars.items()}, step=step)
        self.say(f"epoch {epoch:g}: " + ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))

    def measure(self, data: Any | None, name: str, predictions: bool = False) -> Measured | None:
        """Measures on a split; None if there is none, or a signal came."""
        if data is None:
            return None
        config = self.config
        measured = evaluate(
            self.accelerator, self.objective, data, self.splits.collate, task=config.task,
            classes=self.splits.classes, batch_size=config.evaluation.batch_size or 2 * config.batch_size,
            workers=config.workers, name=name, predictions=predictions,
            on_target=config.evaluation.attention_on_target, bad_share=config.data.bad_share, stop=self.wish,
        )  # fmt: skip
        for bad, reason in measured.bad if measured is not None else ():
            if bad not in self.unread:
                self.unread[bad] = reason
                self.say(f"left out of {name}: {bad}: {reason}")
        for line in self.notes.add([] if measured is None else measured.notes):
            self.say(line)
        if measured is not None and predictions and self.accelerator.is_main_process:
            measured.write_predictions(self.place / folder.PREDICTIONS)
        return measured

    def progress(self) -> dict[str, Any]:
        """Returns what has to be known to go on."""
        return {"validation": self.validation, "validated": self.validated}

    def restore(self, progress: dict[str, Any]) -> None:
        """Takes up what `progress` returned."""
        self.validation, self.validated = progress["validation"], progress["validated"]

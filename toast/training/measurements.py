"""What a run measures: the validation split on its way, the other splits at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from toast.data.vision.noting import Notes
from toast.training import run_folder
from toast.training.answering import measure_answers
from toast.training.best import Best
from toast.training.data import Splits
from toast.training.run_config import RunConfig
from toast.training.split_measures import Measured, evaluate


class Measurements:
    """The measurements of one run.

    Args:
        accelerator: What prepared the objective.
        objective: Gives logits with `predict=True`.
        splits: The data.
        tokenizer: Language: the model's tokenizer.
        config: The run's configuration.
        epoch: Steps of an epoch.
        total: Steps of the run.
        notes: Counts what is met in samples.
        say: Shows a line.
        stop_requested: Whether the run is asked to stop, which gives a measurement up.

    Attributes:
        validation: The last figures of the validation split; None if there are none.
        validated: The step that they are of; -1 before the first.
        before: Figures by split before the first step, if they are wanted.
        best: The best measurement of the validation split, if it is kept.
        unread: Samples that could not be read: name and reason.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        splits: Splits,
        tokenizer: Any,
        config: RunConfig,
        epoch: int,
        total: int,
        notes: Notes,
        say: Callable[[str], None],
        stop_requested: Callable[[], int],
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.splits = splits
        self.tokenizer = tokenizer
        self.config = config
        self.place: Path = config.folder
        self.epoch = epoch
        self.total = total
        self.notes = notes
        self.say = say
        self.stop_requested = stop_requested
        self.validation: dict[str, Any] | None = None
        self.validated = -1
        self.before: dict[str, dict[str, Any]] = {}
        self.best = Best(accelerator, objective, config.checkpoint.best, config.checkpoint.patience)
        self.unread: dict[str, str] = {}

    def measure_before(self) -> None:
        """Measures what is measured at the end as well before the first step, if that is wanted; once."""
        for name, data in (("validation", self.splits.validation), ("test", self.splits.test)):
            if self.config.evaluation.before and name not in self.before and not self.stop_requested():
                measured = self.measure(data, name)
                if measured is not None:
                    self.before[name] = measured.metrics
                    self.say(f"before training, {name}: {_shown(measured.metrics)}")

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
        is_best = self.best.note(step, measured.metrics)
        scalars = {name: value for name, value in measured.metrics.items() if isinstance(value, float)}
        epoch = round(step / self.epoch, 4)
        if self.accelerator.is_main_process:
            row = {"step": step, "epoch": epoch, "split": "validation", **scalars}
            run_folder.append_metrics(self.place, row)
        self.accelerator.log({f"validation/{name}": value for name, value in scalars.items()}, step=step)
        self.say(f"epoch {epoch:g}: {_shown(measured.metrics)}{', the best so far' if is_best else ''}")
        if self.best.is_over and step < self.total:
            self.say(
                f"stopped after {step} of {self.total} steps: {self.best.since} measurements without a "
                f"better {self.best.by} (checkpoint.patience)"
            )

    @property
    def figures(self) -> dict[str, Any] | None:
        """The validation split's figures of what is saved: the best, if it is kept, else the last."""
        return self.best.figures or self.validation

    def take_best(self) -> None:
        """Puts back what was trained when the run measured best, if that is kept."""
        best = self.best
        if best.step not in (None, self.validated):
            value = best.figures[best.by or ""]
            self.say(f"the adapter is that of step {best.step}, whose {best.by} was best: {value:.4f}")
            best.take_up()

    def measure(self, data: Any | None, name: str, predictions: bool = False) -> Measured | None:
        """Measures on a split; None if there is none, or a signal came."""
        if data is None:
            return None
        config = self.config
        measured = evaluate(
            self.accelerator, self.objective, data, self.splits.collate, answers=self.splits.answers,
            batch_size=config.evaluation.batch_size or 2 * config.batch_size,
            workers=config.workers, name=name, predictions=predictions,
            on_target=config.evaluation.attention_on_target, bad_share=config.data.bad_share,
            stop=self.stop_requested,
        )  # fmt: skip
        for bad, reason in measured.bad if measured is not None else ():
            if bad not in self.unread:
                self.unread[bad] = reason
                self.say(f"skipped in {name}: {bad}: {reason}")
        for line in self.notes.add([] if measured is None else measured.notes):
            self.say(line)
        if measured is not None and name == "test" and config.evaluation.format is not None:
            answers = measure_answers(
                self.accelerator, self.objective, data, self.tokenizer, config.evaluation.format,
                config.evaluation.batch_size or 2 * config.batch_size, self.stop_requested,
            )  # fmt: skip
            if answers is None:
                return None
            measured.metrics |= answers
        if measured is not None and predictions and self.accelerator.is_main_process:
            measured.write_predictions(self.place / run_folder.PREDICTIONS)
        return measured

    def progress(self) -> dict[str, Any]:
        """Returns what has to be known to go on."""
        held = {"validation": self.validation, "validated": self.validated, "before": self.before}
        return {**held, "unread": self.unread, "best": self.best.progress()}

    def restore(self, progress: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Takes up what `progress` returned, and the weights of the best measurement.

        What a checkpoint of an earlier version has not recorded was not wanted then.
        """
        self.validation, self.validated = progress["validation"], progress["validated"]
        self.before, self.unread = progress.get("before", {}), progress.get("unread", {})
        if "best" in progress:
            self.best.restore(progress["best"], weights)


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))

"""A run from its configuration to its folder: either stage, any method."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from tqdm import tqdm

from toast.data.vision.noting import Notes
from toast.files.atomic import finite, try_folder
from toast.training import checkpoints, run_folder
from toast.training.accelerating import loads_in_main, make_accelerator, send_start, shard_by_map
from toast.training.at_end import beside_test
from toast.training.cached_passes import stored_first_pass
from toast.training.finite import Diverged, all_finite, as_words, listed
from toast.training.interrupts import Interrupted, Lost, StopRequest, is_lost, listening
from toast.training.locking import by_main, locked
from toast.training.log import Log
from toast.training.loop import Loop, Step
from toast.training.measurements import Measurements
from toast.training.methods import save_method
from toast.training.optimizers import make_optimizer, make_schedule
from toast.training.order import EpochBatches
from toast.training.pace import Pace
from toast.training.preparing import Stage, prepare, remarks_on
from toast.training.resuming import ended_run, refuse_changed, refuse_other_classes
from toast.training.run_card import add_run_to_card
from toast.training.run_config import RunConfig
from toast.training.split_measures import Measured
from toast.training.trained_state import adapter_state, elements
from toast.training.training_batches import TrainingBatches, training_loader
from toast.training.workers import as_messages

logger = logging.getLogger(__name__)


@as_messages()
def run(config: RunConfig, stage: Stage, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures and saves.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`.
        resume: Go on from the newest checkpoint of the run's folder, if there is one.
        quiet: Show progress only; messages are logged.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: If something is missing or does not fit, or the folder holds another run, or another
            process writes into it.
        Diverged: If a loss, gradient or weight was not finite; the checkpoint from before stays.
        Interrupted: If a signal came; a checkpoint was written.
    """
    accelerator = make_accelerator(config)
    by_main(accelerator, lambda: _try_paths(config))
    with locked(accelerator, config.folder):
        ended = by_main(accelerator, lambda: ended_run(config, stage, resume))
        return Run(config, stage, quiet, accelerator).execute(resume) if ended is None else ended


class Run:
    """One run, prepared. `execute` tells what happens in it, `train` what happens between its steps.

    Args:
        config: Its configuration.
        stage: `pretune` or `tune`.
        quiet: Show progress only; messages are logged.
        accelerator: Devices, processes and precision; None makes it.

    Attributes:
        made: Steps that are done, those that were left out included.
        skipped: Steps that were left out, with the names of their samples.

    Raises:
        ValueError: If something is missing or does not fit.
    """

    def __init__(
        self, config: RunConfig, stage: Stage, quiet: bool = False, accelerator: Accelerator | None = None
    ) -> None:
        self.began = time.perf_counter()
        self.quiet = quiet
        self.config, self.stage, self.place = config, stage, config.folder
        self.accelerator: Accelerator = accelerator or make_accelerator(config)
        prepared = prepare(config, stage, loads_in_main(self.accelerator) and not self.is_main)
        send_start(self.accelerator, prepared)
        self.splits = prepared.splits
        for remark in remarks_on(prepared, config) if self.is_main else ():
            self.say(remark)
        stored = stored_first_pass(config, stage, self.accelerator, prepared, self.say)
        micro_batch = config.batch_size // config.micro_batches
        self.order = EpochBatches(len(self.splits.train), micro_batch, config.micro_batches, config.seed)
        self.total = config.steps or (config.epochs or 1) * self.order.steps
        groups = prepared.method.groups
        optimizer = make_optimizer(prepared.method.model, groups, config.optimizer, prepared.input_sizes)
        schedule = make_schedule(optimizer, config.optimizer, self.total)
        loader = training_loader(self.splits, self.order, config.workers, self.accelerator.device)
        shard_by_map(self.accelerator, prepared)
        self.objective, optimizer, loader = self.accelerator.prepare(prepared.objective, optimizer, loader)
        # A sharded model has other parameters under the same names.
        live = dict(self.accelerator.unwrap_model(self.objective).model.named_parameters())
        self.groups = {group: {name: live[name] for name in held} for group, held in groups.items()}
        self.trained = [parameter for held in self.groups.values() for parameter in held.values()]
        self.notes = Notes()
        self.batches = TrainingBatches(
            self.splits, self.order, loader, stored, config.data.bad_share, self.notes, self.say
        )
        self.loop = Loop(
            self.accelerator, self.objective, optimizer, schedule, self.batches, self.trained, config,
            self.total,
        )  # fmt: skip
        self.stop_requested = StopRequest(self.accelerator)
        self.log = Log(self.accelerator, self.place, self.order.steps)
        self.measurements = Measurements(
            self.accelerator, self.objective, self.splits, prepared.backbone.tokenizer, config,
            self.order.steps, self.total, self.notes, self.say, lambda: self.stop_requested(),
        )  # fmt: skip
        self.pace = Pace()
        self.made = 0
        self.skipped: dict[str, list[str]] = {}

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def is_done(self) -> bool:
        """Whether no steps are left: all are made, or `checkpoint.patience` is at its end."""
        return self.made >= self.total or self.measurements.best.is_over

    def say(self, text: str) -> None:
        """Shows a line, once for all processes."""
        if self.is_main:
            (logger.info if self.quiet else tqdm.write)(text)

    def execute(self, resume: bool) -> dict[str, Any]:
        """Does all of it; see `run`."""
        sizes = {group: sum(map(elements, held.values())) for group, held in self.groups.items()}
        counts = ", ".join(f"{group} {count:,}" for group, count in sizes.items())
        self.say(f"{self.config.name}: {self.config.method.name}, {counts} trained; {self.place}/")
        with listening(self.accelerator) as self.stop_requested:
            try:
                if resume:
                    self.resume()
                self.log.begin(self.made, self.config, self.splits.answers.record())
                if not self.made:
                    self.measurements.measure_before()
                self.measurements.validate_if_due(self.made)  # a signal may have come before
                self.train()
                test, beside = self.measure_at_end()
                if not self.is_done or self.stop_requested():
                    self.interrupted()
            except RuntimeError as error:
                if not is_lost(self.accelerator, error):
                    raise
                self.lost(error)
        return self.finish(sizes, test, beside)

    def train(self) -> None:
        """Makes the steps until all are made or a signal comes; logs, measures and checkpoints as it goes."""
        every, steps_of_epoch = self.config.checkpoint.every, self.order.steps
        shown = {"desc": self.config.name, "unit": "step", "disable": not self.is_main}
        with tqdm(total=self.total, initial=self.made, **shown) as bar:
            for step in () if self.is_done else self.loop.steps(self.made):
                if step.bad:
                    self.leave_out(step)
                else:
                    self.log.note(step.number, step.losses)
                self.made = step.number
                bar.update()
                ends_epoch = self.made % steps_of_epoch == 0 or self.made == self.total
                if ends_epoch or self.made % self.config.log_every == 0:
                    self.flush()
                    if self.log.loss is not None:
                        bar.set_postfix_str(f"loss {self.log.loss:.4f}", refresh=False)
                if ends_epoch and not self.stop_requested():
                    self.measurements.validate_if_due(self.made)
                if self.stop_requested():
                    break  # `interrupted` writes a checkpoint
                if ends_epoch or (every is not None and self.made % every == 0):
                    self.checkpoint()
                if self.is_done:
                    break
            self.flush()

    def measure_at_end(self) -> tuple[Measured | None, dict[str, Any]]:
        """Measures what is saved, unless steps are left or a signal comes.

        Returns:
            What the test split gave, and what is measured beside it.
        """
        if not self.is_done:
            return None, {}
        self.measurements.validate_if_due(self.made)
        if not self.stop_requested():
            self.measurements.take_best()
        measure, predictions = self.measurements.measure, self.config.evaluation.predictions
        test = None if self.stop_requested() else measure(self.splits.test, "test", predictions)
        beside = {} if self.stop_requested() else beside_test(self.splits, measure)
        return test, beside

    def finish(
        self, trained: dict[str, int], test: Measured | None, beside: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes what was trained, and what came out."""
        model = self.accelerator.unwrap_model(self.objective).model
        result: dict[str, Any] = {
            "name": self.config.name,
            "stage": self.stage,
            "task": self.config.task,
            "method": self.config.method.name,
            "trained": trained,
            "trainable_parameters": sum(trained.values()),
            "parameters": sum(map(elements, model.parameters())),
            "steps": self.made,
            "samples": self.splits.summary,
            "validation": self.measurements.figures,
            "test": None if test is None else test.metrics,
            **({"before": self.measurements.before} if self.measurements.before else {}),
            **self.measurements.best.summary(),
            **beside,
            "bad_samples": self.batches.bad | self.measurements.unread,
            "skipped_steps": self.skipped,
            "remarks": [*self.splits.remarks, *self.notes.summary()],
            "step_seconds": round(self.loop.seconds, 2),
            "median_step_seconds": self.pace.median,
            "seconds": round(time.perf_counter() - self.began, 2),
        }
        gathered = adapter_state(self.accelerator, model)
        if self.is_main:
            save_method(model, self.config, self.place / run_folder.ADAPTER, gathered)
            add_run_to_card(self.place / run_folder.ADAPTER, self.config, result)
            run_folder.write_json(self.place / run_folder.RESULT, result)
        self.log.end()
        self.accelerator.wait_for_everyone()
        return dict(finite(result))

    def flush(self) -> None:
        """Writes the losses that were noted; the first that is not finite ends the run."""
        began, steps = time.perf_counter(), len(self.log.pending)
        found = self.log.flush()
        if steps:  # reading the first loss has waited for the device
            self.loop.seconds += time.perf_counter() - began
            self.pace.note(self.loop.seconds, steps)
        if found is not None:
            number, bad = found
            self.diverged(number, as_words(bad))

    def leave_out(self, step: Step) -> None:
        """Notes a step that was left out, or ends the run with a checkpoint from before it."""
        self.flush()
        what = as_words(step.bad)
        if self.config.on_nonfinite == "stop":
            self.diverged(step.number, what, self.checkpoint(more=1))
        names = self.batches.names(step.number - 1)
        self.skipped[str(step.number)] = names
        self.say(f"skipped step {step.number}: {what}; its samples: {listed(names)}")

    def diverged(self, number: int, what: str, before: Path | None = None) -> NoReturn:
        """Ends the run; names the step, its samples, and the checkpoint from before."""
        before = before or checkpoints.newest_checkpoint(self.place / run_folder.CHECKPOINTS)
        names = self.batches.names(number - 1)
        self.log.end()
        raise Diverged(number, self.total, what, names, before)

    def interrupted(self) -> NoReturn:
        """Writes a checkpoint and says how to go on."""
        number = self.stop_requested()
        at = self.checkpoint()
        self.log.end()
        raise Interrupted(
            number,
            f"interrupted after {self.made} of {self.total} steps; {at} holds it. Continue with --resume.",
        )

    def lost(self, error: RuntimeError) -> NoReturn:
        """Writes a checkpoint without the process that has ended, if this one holds all that it needs."""
        folder, best = self.place / run_folder.CHECKPOINTS, self.measurements.best.weights
        at = checkpoints.save_alone(self.accelerator, folder, self.made, self.progress(), best)
        at = at or checkpoints.newest_checkpoint(folder)
        self.log.write_alone(self.made)
        raise Lost(self.made, self.total, error, at) from error

    def checkpoint(self, more: int = 0) -> Path:
        """Writes a checkpoint.

        Args:
            more: How many more earlier ones stay than usual.

        Raises:
            Diverged: If what was trained is not finite; the checkpoints from before stay.
        """
        self.flush()
        if not all_finite(self.accelerator, self.trained):
            self.diverged(self.made, "the weights after the step are not finite")
        at, keep = self.place / run_folder.CHECKPOINTS, self.config.checkpoint.keep + more
        return checkpoints.save_checkpoint(
            self.accelerator, at, self.made, self.progress(), keep, self.measurements.best.weights
        )

    def progress(self) -> dict[str, Any]:
        """Returns what has to be known to go on, beside weights and optimiser."""
        return {
            **self.measurements.progress(),
            "bad": self.batches.bad,
            "skipped": self.skipped,
            "step_seconds": self.loop.seconds,
            "seconds": time.perf_counter() - self.began,
            "data": self.splits.fingerprint,
            **self.identity(),
        }

    def resume(self) -> None:
        """Goes to the newest checkpoint, if there is one."""
        newest = checkpoints.newest_checkpoint(self.place / run_folder.CHECKPOINTS, self.say)
        if newest is None:
            if (self.place / run_folder.METRICS).is_file():
                self.say(f"{self.place} has no checkpoint yet; starting from the beginning")
            return
        refuse_other_classes(
            self.place / run_folder.LABELS, self.splits.answers.record(), bool(self.config.heads)
        )
        progress = checkpoints.load_checkpoint(self.accelerator, newest)
        refuse_changed(self.identity(), progress, str(newest))
        self.made = int(progress["step"])
        self.measurements.restore(progress, checkpoints.load_best(newest))
        self.batches.bad, self.loop.seconds = progress["bad"], progress["step_seconds"]
        self.pace.start(self.loop.seconds)
        self.began -= progress.get("seconds", 0.0)  # a checkpoint of an earlier version has none
        self.skipped = progress.get("skipped", {})
        held = progress.get("data", self.splits.fingerprint)
        if held != self.splits.fingerprint and not self.config.data.streaming:
            self.say(
                "the training data have changed since the run began (names, sizes or modification times)"
            )
        self.say(f"resumed from {newest}")

    def identity(self) -> dict[str, Any]:
        """Returns what the results depend on beside the settings; a checkpoint of another one is refused."""
        return {
            "stage": self.stage,
            "total": self.total,
            "precision": str(self.accelerator.mixed_precision),
            "samples": len(self.splits.train),
        }


def _try_paths(config: RunConfig) -> None:
    try_folder(config.folder, "out")
    if config.first_pass.mode != "computed" and config.first_pass.folder is not None:
        try_folder(config.first_pass.folder, "first_pass.folder")

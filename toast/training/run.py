"""A run from its configuration to its folder: either stage, any method."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from toast.data.vision.noting import Notes
from toast.files.atomic import finite, try_folder
from toast.training import checkpoints, run_folder
from toast.training.accelerating import make_accelerator, replicate_trained
from toast.training.at_end import beside_test
from toast.training.cached_passes import stored_first_pass
from toast.training.config_files import to_yaml
from toast.training.evaluate import Measured, refuse_bad
from toast.training.finite import Diverged, all_finite, listed, named_samples
from toast.training.interrupts import Interrupted, Lost, is_lost, listening
from toast.training.locking import by_main, locked
from toast.training.log import Log
from toast.training.loop import Batch, Loop
from toast.training.measurements import Measurements
from toast.training.methods import save_method
from toast.training.optimizers import make_optimizer, make_schedule
from toast.training.order import EpochBatches
from toast.training.pace import Pace
from toast.training.preparing import Stage, prepare
from toast.training.resuming import ended_run, flat, refuse_changed, refuse_other_classes
from toast.training.run_config import RunConfig
from toast.training.workers import as_messages

logger = logging.getLogger(__name__)


@as_messages()
def run(config: RunConfig, stage: Stage, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures and saves.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`.
        resume: Go on from the newest checkpoint of the run's folder, if there is one.
        quiet: Show progress only; what would be said is logged.

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
    """One run, prepared.

    Args:
        config: Its configuration.
        stage: `pretune` or `tune`.
        quiet: Show progress only; what would be said is logged.
        accelerator: Devices, processes and precision; None makes it.

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
        self.prepared = prepare(config, stage)
        self.splits = self.prepared.splits
        self.notes = Notes()
        for remark in self.splits.remarks:
            self.say(remark)
        if config.task == "language" and config.data.packing == "documents":
            self.say_leaks()
        self.stored = stored_first_pass(config, stage, self.accelerator, self.prepared, self.say)
        self.order = EpochBatches(
            len(self.splits.train),
            config.batch_size // config.micro_batches,
            config.micro_batches,
            config.seed,
        )
        self.total = config.steps or (config.epochs or 1) * self.order.steps
        groups = self.prepared.method.groups
        optimizer = make_optimizer(self.prepared.method.model, groups, config.optimizer)
        schedule = make_schedule(optimizer, config.optimizer, self.total)
        loader = DataLoader(
            self.splits.train,
            batch_sampler=self.order,
            collate_fn=self.splits.collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        replicate_trained(self.accelerator, self.prepared)
        self.objective, self.optimizer, loader = self.accelerator.prepare(
            self.prepared.objective, optimizer, loader
        )
        # A sharded model has other parameters under the same names.
        live = dict(self.accelerator.unwrap_model(self.objective).model.named_parameters())
        self.groups = {group: {name: live[name] for name in held} for group, held in groups.items()}
        self.loop = Loop(
            self.accelerator, self.objective, self.optimizer, schedule, loader, self.order, self.groups,
            config.task, self.total, config.seed, config.optimizer.clip, self.is_watched, self.complete,
            self.on_step, self.on_nonfinite, self.on_epoch, lambda: self.measurements.best.is_over,
        )  # fmt: skip
        self.log = Log(self.accelerator, self.place, self.order.steps)
        self.measurements = Measurements(
            self.accelerator, self.objective, self.splits, config, self.order.steps, self.total, self.notes,
            self.say, lambda: self.loop.wish(),
        )  # fmt: skip
        self.bad: dict[str, str] = {}  # of the training split; the measurements count theirs
        self.skipped: dict[str, list[str]] = {}
        self.pace = Pace()
        self.bar: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def is_watched(self) -> bool:
        """Whether each step's loss is looked at before its update: if asked for, or if it costs no wait."""
        return self.config.on_nonfinite == "skip" or self.accelerator.device.type == "cpu"

    def say(self, text: str) -> None:
        """Shows a line, once for all processes."""
        if self.is_main:
            (logger.info if self.quiet else tqdm.write)(text)

    def say_leaks(self) -> None:
        """Says so if packed documents see each other, which depends on attention kernel and method."""
        from toast.data.language import leaks

        if leaks(self.prepared.method.model, len(self.prepared.backbone.tokenizer)):
            self.say(
                "packed documents attend to each other in this model: its attention ignores positions that "
                "restart. Load it with attn_implementation=sdpa, or set data.packing=none."
            )

    def execute(self, resume: bool) -> dict[str, Any]:
        """Does all of it; see `run`."""
        trained = {group: sum(p.numel() for p in held.values()) for group, held in self.groups.items()}
        counts = ", ".join(f"{group} {count:,}" for group, count in trained.items())
        self.say(f"{self.config.name}: {self.config.method.name}, {counts} trained; {self.place}/")
        with listening(self.accelerator) as self.loop.wish:
            try:
                test, beside = self.train_and_measure(resume)
            except RuntimeError as error:
                if not is_lost(self.accelerator, error):
                    raise
                self.lost(error)
        return self.finish(trained, test, beside)

    def train_and_measure(self, resume: bool) -> tuple[Measured | None, dict[str, Any]]:
        """Makes the steps and measures; returns what the test split gave, and what is measured beside it."""
        step = self.resume() if resume else 0
        self.describe(step)
        if not step:
            self.measurements.measure_before()
        self.measurements.validate_if_due(step)  # a signal may have come before
        shown = {"desc": self.config.name, "unit": "step", "disable": not self.is_main}
        with tqdm(total=self.total, initial=step, **shown) as self.bar:
            step = self.loop.run(step)
            self.flush()
        is_done = step == self.total or self.measurements.best.is_over
        if is_done:
            self.measurements.validate_if_due(step)
        if is_done and not self.loop.wish():
            self.measurements.take_best()
        measure, predictions = self.measurements.measure, self.config.evaluation.predictions
        test = None if self.loop.wish() else measure(self.splits.test, "test", predictions)
        beside = {} if self.loop.wish() else beside_test(self.splits, measure)
        if not is_done or self.loop.wish():
            self.interrupted(step)
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
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": self.loop.made,
            "samples": self.splits.summary,
            "validation": self.measurements.figures,
            "test": None if test is None else test.metrics,
            **({"before": self.measurements.before} if self.measurements.before else {}),
            **self.measurements.best.summary(),
            **beside,
            "bad_samples": self.bad | self.measurements.unread,
            "skipped_steps": self.skipped,
            "remarks": [*self.splits.remarks, *self.notes.summary()],
            "step_seconds": round(self.loop.seconds, 2),
            "median_step_seconds": self.pace.median,
            "seconds": round(time.perf_counter() - self.began, 2),
        }
        if self.is_main:
            save_method(model, self.config, self.place / run_folder.ADAPTER)
            run_folder.write_json(self.place / run_folder.RESULT, result)
        self.end_trackers()
        self.accelerator.wait_for_everyone()
        return dict(finite(result))

    def complete(self, batch: Batch, step: int) -> Batch:
        """Counts what could not be read, and adds what is stored of a batch's samples."""
        self.count_bad(batch.pop("bad", []))
        for line in self.notes.add(batch.pop("notes", [])):
            self.say(line)
        return batch if self.stored is None else self.stored.complete(batch, step // self.order.steps)

    def count_bad(self, bad: list[tuple[str, str]]) -> None:
        """Names samples that cannot be read, once each.

        Raises:
            ValueError: If they are more than the configured share.
        """
        for name, reason in bad:
            if name not in self.bad:
                self.bad[name] = reason
                self.say(f"skipped {name}: {reason}")
        refuse_bad(self.bad, len(self.splits.train), "training", self.config.data.bad_share)

    def on_step(self, step: int, parts: dict[str, Tensor | float]) -> None:
        """Notes the losses of a step; they are read from the device every few steps."""
        self.log.note(step, parts)
        self.bar.update()
        if step % self.config.log_every == 0:
            self.flush()
        every = self.config.checkpoint.every
        if every is not None and step % every == 0 and step % self.order.steps:
            self.checkpoint(step)

    def flush(self) -> None:
        """Writes the losses that were noted; the first that is not finite ends the run."""
        began, steps = time.perf_counter(), len(self.log.pending)
        found = self.log.flush()
        if steps:  # reading the first loss has waited for the device
            self.loop.seconds += time.perf_counter() - began
            self.pace.note(self.loop.seconds, steps)
        if self.bar is not None and self.log.loss is not None:
            self.bar.set_postfix_str(f"loss {self.log.loss:.4f}", refresh=False)
        if found is not None:
            step, bad = found
            self.diverged(step, f"the {' and the '.join(bad)} of the step is not finite", None)

    def on_nonfinite(self, step: int, bad: list[str]) -> None:
        """Leaves a step out whose numbers are not finite, or ends the run with a checkpoint from before."""
        self.flush()
        what = f"the {' and the '.join(bad)} of the step is not finite"
        if self.config.on_nonfinite == "stop":
            self.diverged(step + 1, what, self.checkpoint(step, more=1))
        names = named_samples(self.splits.train, self.order.keys(step))
        self.skipped[str(step + 1)] = names
        self.say(f"skipped step {step + 1}: {what}; its samples: {listed(names)}")
        self.bar.update()

    def diverged(self, step: int, what: str, before: Path | None) -> NoReturn:
        """Ends the run; names the step, its samples, and the checkpoint from before."""
        before = before or checkpoints.newest_checkpoint(self.place / run_folder.CHECKPOINTS)
        names = named_samples(self.splits.train, self.order.keys(step - 1))
        self.end_trackers()
        raise Diverged(step, self.total, what, names, before)

    def on_epoch(self, step: int) -> None:
        """Measures and writes a checkpoint."""
        self.flush()
        self.measurements.validate_if_due(step)
        if not self.loop.wish():  # else one is written on the way out
            self.checkpoint(step)

    def end_trackers(self) -> None:
        """Lets trackers write. Accelerate's own end would take the processes from the next run of a sweep."""
        if self.is_main:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def checkpoint(self, step: int, more: int = 0) -> Path:
        """Writes a checkpoint.

        Args:
            step: Steps that were made.
            more: How many more earlier ones stay than usual.

        Raises:
            Diverged: If what was trained is not finite; the checkpoints from before stay.
        """
        self.flush()
        if not all_finite(self.accelerator, (p for held in self.groups.values() for p in held.values())):
            self.diverged(step, "the weights after the step are not finite", None)
        at, keep = self.place / run_folder.CHECKPOINTS, self.config.checkpoint.keep + more
        return checkpoints.save_checkpoint(
            self.accelerator, at, step, self.progress(), keep, self.measurements.best.weights
        )

    def progress(self) -> dict[str, Any]:
        """Returns what has to be known to go on, beside weights and optimiser."""
        return {
            **self.measurements.progress(),
            "bad": self.bad,
            "skipped": self.skipped,
            "step_seconds": self.loop.seconds,
            "seconds": time.perf_counter() - self.began,
            "data": self.splits.fingerprint,
            **self.identity(),
        }

    def resume(self) -> int:
        """Goes to the newest checkpoint; returns the steps that were made."""
        newest = checkpoints.newest_checkpoint(self.place / run_folder.CHECKPOINTS, self.say)
        if newest is None:
            if (self.place / run_folder.METRICS).is_file():
                self.say(f"{self.place} has no checkpoint yet; starting from the beginning")
            return 0
        refuse_other_classes(self.place / run_folder.LABELS, self.splits.classes)
        progress = checkpoints.load_checkpoint(self.accelerator, newest)
        refuse_changed(self.identity(), progress, str(newest))
        step = int(progress["step"])
        self.measurements.restore(progress, checkpoints.load_best(newest))
        self.bad, self.loop.seconds = progress["bad"], progress["step_seconds"]
        self.pace.start(self.loop.seconds)
        self.began -= progress.get("seconds", 0.0)  # a checkpoint of an earlier version has none
        self.skipped = progress.get("skipped", {})
        held = progress.get("data", self.splits.fingerprint)
        if held != self.splits.fingerprint and not self.config.data.streaming:
            self.say(
                "the training data have changed since the run began (names, sizes or modification times)"
            )
        self.say(f"resumed from {newest}")
        return step

    def identity(self) -> dict[str, Any]:
        """Returns what the results depend on beside the settings; a checkpoint of another one is refused."""
        return {
            "stage": self.stage,
            "total": self.total,
            "precision": str(self.accelerator.mixed_precision),
            "samples": len(self.splits.train),
        }

    def describe(self, step: int) -> None:
        """Writes what the run is; all has been checked by now."""
        if self.is_main:
            run_folder.begin(self.place, step, to_yaml(self.config), self.splits.classes)
        self.accelerator.init_trackers("tensorboard", config=flat(self.config.model_dump(mode="json")))
        self.accelerator.wait_for_everyone()

    def lost(self, error: RuntimeError) -> NoReturn:
        """Writes a checkpoint without the process that has ended, if this one holds all that it needs."""
        step = self.loop.made
        at = checkpoints.save_alone(
            self.accelerator,
            self.place / run_folder.CHECKPOINTS,
            step,
            self.progress(),
            self.measurements.best.weights,
        ) or checkpoints.newest_checkpoint(self.place / run_folder.CHECKPOINTS)
        self.log.write_alone(step)
        raise Lost(step, self.total, error, at) from error

    def interrupted(self, step: int) -> NoReturn:
        """Writes a checkpoint and says how to go on."""
        number = self.loop.wish()
        at = self.checkpoint(step)
        self.end_trackers()
        raise Interrupted(
            number, f"interrupted after {step} of {self.total} steps; {at} holds it. Continue with --resume."
        )


def _try_paths(config: RunConfig) -> None:
    try_folder(config.folder, "out")
    if config.first_pass.mode != "computed" and config.first_pass.folder is not None:
        try_folder(config.first_pass.folder, "first_pass.folder")

"""The losses of a run: noted in each step, read from the device and written every few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from toast.training import run_folder
from toast.training.config_files import to_yaml
from toast.training.finite import not_finite, read
from toast.training.resuming import flat
from toast.training.run_config import RunConfig


class Log:
    """The losses of training steps on their way to `metrics.jsonl` and the trackers.

    Args:
        accelerator: Knows the processes and the trackers.
        place: The run's folder.
        epoch: Steps of an epoch.
    """

    def __init__(self, accelerator: Accelerator, place: Path, epoch: int) -> None:
        self.accelerator = accelerator
        self.place = place
        self.epoch = epoch
        self.pending: list[tuple[int, dict[str, Tensor | float]]] = []
        self.loss: float | None = None

    def begin(self, step: int, config: RunConfig, labels: Any) -> None:
        """Writes what the run is, and tells the trackers.

        Args:
            step: Steps that were made; measurements after them are taken back.
            config: The run's configuration.
            labels: What `labels.json` holds.
        """
        if self.accelerator.is_main_process:
            run_folder.begin(self.place, step, to_yaml(config), labels)
        self.accelerator.init_trackers("tensorboard", config=flat(config.model_dump(mode="json")))
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Lets trackers write. Accelerate's own end would take the processes from the next run of a sweep."""
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def note(self, step: int, parts: dict[str, Tensor | float]) -> None:
        """Takes the losses of a step, which are the same in every process."""
        self.pending.append((step, parts))

    def flush(self) -> tuple[int, list[str]] | None:
        """Writes what was noted, up to the first step whose numbers are not finite.

        Returns:
            That step and what is not finite; None if all are.
        """
        pending, self.pending = self.pending, []
        for step, parts in pending:
            values = read(parts)
            bad = not_finite(values, scaled=self.accelerator.scaler is not None)
            if bad:
                return step, bad
            self.loss = values["loss"]
            if self.accelerator.is_main_process:
                run_folder.append_metrics(self.place, self._row(step, values))
            self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)
        return None

    def write_alone(self, step: int) -> None:
        """Writes what was noted when the process that writes may have ended, in the middle of a line.

        Args:
            step: Steps that were made; lines of later ones are taken back.
        """
        run_folder.cut_metrics(self.place, step)
        last = max((row["step"] for row in run_folder.read_metrics(self.place)), default=0)
        for number, parts in self.pending:
            if last < number <= step:
                run_folder.append_metrics(self.place, self._row(number, read(parts)))

    def _row(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        return {"step": step, "epoch": round(step / self.epoch, 4), "split": "train", **values}

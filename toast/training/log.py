"""The losses of a run: noted in each step, read from the device and written every few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from toast.training import run_folder
from toast.training.finite import not_finite, read


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

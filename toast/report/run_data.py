"""What a run's folder holds, ended or not, and the sweep that the run lies in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toast.training import run_folder
from toast.training.config_files import load_config
from toast.training.run_config import RunConfig

#: Folders of a sweep that hold runs by row.
_OF_SWEEP = ("final", "search")


@dataclass(frozen=True)
class Sweep:
    """The sweep that a run lies in.

    Args:
        name: Its name.
        row: The run's row.
        rows: By row what `sweep.json` says of it; none of a sweep whose first row has not ended.
        seeds: Runs behind each figure.
    """

    name: str
    row: str
    rows: dict[str, dict[str, Any]]
    seeds: int


@dataclass(frozen=True)
class RunFiles:
    """What is there of a run.

    Args:
        place: Its folder.
        config: Its configuration.
        environment: Machine, versions and command; empty if it was not written.
        metrics: The lines of `metrics.jsonl`.
        classes: Vision: names of the labels; empty where heads are configured.
        result: What `result.json` holds; None if the run has not ended.
        predictions: The lines of `predictions.jsonl`; none if they were not wanted.
        sweep: The sweep that it lies in, if it does.
        heads: What was recorded of each head; None of a run without.
    """

    place: Path
    config: RunConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    classes: tuple[str, ...]
    result: dict[str, Any] | None
    predictions: list[dict[str, Any]]
    sweep: Sweep | None
    heads: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """What the run is called: its row and its own name within a sweep."""
        return self.config.name if self.sweep is None else f"{self.sweep.row}, {self.config.name}"

    @property
    def stage(self) -> Literal["pretune", "tune"]:
        """The stage; of a run that has not ended, the one whose losses it wrote."""
        if self.result is not None:
            return "pretune" if self.result["stage"] == "pretune" else "tune"
        return "pretune" if any("reconstruction" in row for row in self.metrics) else "tune"

    @property
    def has_adapter(self) -> bool:
        """Whether what was trained is there to be looked at."""
        return (self.place / run_folder.ADAPTER).is_dir()

    @property
    def done(self) -> int:
        """Steps that were made."""
        return max((int(row["step"]) for row in self.metrics), default=0)

    @property
    def total(self) -> int | None:
        """Steps that were to be made; None if that is not known."""
        if self.config.steps is not None:
            return self.config.steps
        rates = [row["step"] / row["epoch"] for row in self.metrics if row["split"] == "train"]
        # epochs are written with four digits, so the last line tells their length best
        return round(rates[-1] * (self.config.epochs or 1)) if rates else None

    def split(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of `train` or `validation`."""
        return [row for row in self.metrics if row["split"] == name]

    @property
    def measured(self) -> tuple[str, dict[str, Any]]:
        """The split that counts, and its figures: the test split's, else the last of the validation split."""
        if self.result is not None and self.result["test"] is not None:
            return "test", _known(self.result["test"])
        if self.result is not None and self.result["validation"] is not None:
            return "validation", _known(self.result["validation"])
        return "validation", next(iter(self.split("validation")[::-1]), {})

    @property
    def before(self) -> dict[str, Any]:
        """The figures of the split that counts before training; empty if they were not wanted."""
        return _known((self.result or {}).get("before", {}).get(self.measured[0], {}))

    def from_before(self, name: str) -> str:
        """Returns a figure of the split that counts, behind that from before training if it is known."""
        now = f"{self.measured[1][name]:.3f}"
        return f"{self.before[name]:.3f} → {now}" if name in self.before else now


def _known(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures that are numbers; those that were not finite are null."""
    return {name: value for name, value in measured.items() if value is not None}


def read_run(place: Path) -> RunFiles:
    """Reads a run's folder.

    Args:
        place: The folder.

    Raises:
        ValueError: If it is no run's folder, or a file in it is damaged.
    """
    run_folder.refuse_no_run(place)

    def read_if_there(name: str, otherwise: Any) -> Any:
        return run_folder.read_json(place / name) if (place / name).is_file() else otherwise

    config, recorded = load_config(place), place / run_folder.LABELS
    labels = run_folder.read_labels(recorded, bool(config.heads)) if recorded.is_file() else None
    return RunFiles(
        place=place.resolve(),
        config=config,
        environment=read_if_there(run_folder.ENVIRONMENT, {}),
        metrics=run_folder.read_metrics(place),
        classes=() if config.heads or labels is None else tuple(labels),
        heads=labels if config.heads else None,
        result=read_if_there(run_folder.RESULT, None),
        predictions=run_folder.read_predictions(place),
        sweep=_sweep(place.resolve()),
    )


def _sweep(place: Path) -> Sweep | None:
    if len(place.parents) < 3 or place.parent.parent.name not in _OF_SWEEP:
        return None
    around, row = place.parents[2], place.parent.name
    if not (around / run_folder.SWEEP).is_file():
        return Sweep(around.name, row, {}, 0)
    table = run_folder.read_json(around / run_folder.SWEEP)
    return Sweep(table["name"], row, table["rows"], table["seeds"])


def remarks(files: RunFiles) -> list[str]:
    """Returns what a reader should know before trusting the figures."""
    found = []
    if files.result is None:
        of = "" if files.total is None else f" of {files.total:,}"
        found.append(
            f"This run is not finished: {files.done:,}{of} steps are done, and nothing was measured "
            f"at the end. Continue with: toast {files.stage} {files.place} --resume"
        )
    train = files.split("train")
    broken = [row["step"] for row in train if "loss" not in row]
    if broken:
        found.append(f"The training loss is not finite in {len(broken):,} steps, first in {broken[0]:,}.")
    skipped = (files.result or {}).get("skipped_steps") or {}
    if skipped:
        first = next(iter(skipped))
        found.append(
            f"{len(skipped):,} steps were skipped because their loss or gradient was not finite; first "
            f"step {first}, with {', '.join(skipped[first][:3])}."
        )
    best = (files.result or {}).get("best")
    if best is not None:
        early = ", and training ended early" if best["stopped_early"] else ""
        found.append(
            f"The adapter is that of step {best['step']:,} of {files.done:,}, where {best['measure']} of the "
            f"validation split was best ({best['value']:.3f}){early}."
        )
    losses = [(row["loss"], row["epoch"]) for row in files.split("validation") if "loss" in row]
    if len(losses) > 1 and best is None:
        least, last = min(losses), losses[-1]
        if last[0] > 1.05 * least[0]:
            found.append(
                f"The validation loss was lowest after epoch {least[1]:g} ({least[0]:.3f}) and is "
                f"{last[0]:.3f} at the end: the adapter is that of the last step (checkpoint.best=loss keeps "
                "the best)."
            )
    split, measured = files.measured
    if files.result is not None and not measured and files.stage == "tune":
        found.append("Nothing was measured: the configuration names neither a validation nor a test split.")
    elif measured and split == "validation" and files.result is not None:
        found.append(
            "There is no test split: the figures are of the validation split, which was also used to select."
        )
    return found

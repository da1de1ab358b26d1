"""Runs a study: what has its line is not run again, wherever it was run."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import toast
from toast.study import design
from toast.study.lines import Line, append_line, key_of, pictures_path, read_lines, write_pictures
from toast.training import run_folder
from toast.training.measuring import measure
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.sweeping import Row, Settings, choose, make_final, pretune

RESULTS = Path("results/study")


def run_study(
    config: RunConfig,
    only: Iterable[str] = (),
    results: Path = RESULTS,
    dry_run: bool = False,
    console: Console | None = None,
    tasks: Iterable[str] = (),
    processes: int = 1,
) -> int:
    """Runs what is missing of a study.

    A row whose run fails is named and left; the others go on.

    Args:
        config: What all runs share, with the sections `sweep` and `study`.
        only: Patterns of names of rows; none is all.
        results: Folder of the lines.
        dry_run: Say what is missing, and stop.
        console: Where progress is printed; None is the standard output.
        tasks: Patterns of names of tasks; none is all.
        processes: How many run on the machine at a time, of which this is one; lines say so, as seconds then
            mean little.

    Returns:
        The number of lines that were added.

    Raises:
        ValueError: If the file does not fit, before the first run; or, at the end, if rows have failed.
        Interrupted: If a signal came; call it again to go on.
    """
    console = console or Console(soft_wrap=True)
    study = Study(config, results, console, processes)
    pairs = study.checked(only, tasks)
    if dry_run:
        for row, cell in pairs:
            if wanted := study.missing(row, cell):
                seeds = ", ".join(str(seed) for seed in wanted)
                console.print(f"{cell.name}: {row.name}, seed {seeds}", highlight=False, markup=False)
        return 0
    failed = []
    for row, cell in pairs:
        try:
            study.do(row, cell)
        except ValueError as error:
            failed.append(f"{cell.name}: {row.name}: {error}")
            console.print(failed[-1], style="red", highlight=False, markup=False)
    if failed:
        raise ValueError("rows have failed; the others are done:\n  " + "\n  ".join(failed))
    return study.added


class Study:
    """A study with the lines that it has.

    Args:
        config: The study's file.
        results: Folder of the lines.
        console: Where progress is printed.
        processes: How many run on the machine at a time, of which this is one.

    Raises:
        ValueError: If the file has no section `study` or `sweep`.
    """

    def __init__(self, config: RunConfig, results: Path, console: Console, processes: int = 1) -> None:
        design.cells(config)  # raises what is wrong with them
        assert config.study is not None
        self.config, self.study, self.sweep = config, config.study, config.checked_sweep()
        self.results, self.console, self.processes = results, console, processes
        self.path = results / f"{config.name}.jsonl"
        self.lines = {key_of(line): line for line in read_lines(self.path)}
        self.added = 0

    def checked(self, only: Iterable[str], tasks: Iterable[str]) -> list[tuple[Row, design.Cell]]:
        """Returns rows with their cells, those first from which others' settings come.

        Args:
            only: Patterns of names of rows; none is all.
            tasks: Patterns of names of tasks; none is all.

        Raises:
            ValueError: If a setting does not fit, or the lines are of other settings.
        """
        cells = design.cells(self.config, tuple(tasks))
        cells.sort(key=lambda cell: design.searched(self.config, cell) != cell)
        pairs = [(row, cell) for cell in cells for row in design.rows(self.config, tuple(only))]
        for row, cell in pairs:
            self.check(row, cell)
        return pairs

    def check(self, row: Row, cell: design.Cell) -> None:
        """Makes every configuration of a row, and compares the lines that it has.

        Raises:
            ValueError: If a setting does not fit, or the lines are of other settings.
        """
        sweep, inside = design.sweep_of(self.config, cell), design.in_cell(row, cell)
        for point in row.points():
            make_final(sweep, inside, point, 0)
        wanted = design.digest(self.config, row, cell)
        for line in self.of(row, cell):
            if line["settings"] != wanted:
                raise ValueError(
                    f"{self.path} holds {row.name} ({cell.name}) of other settings. Delete its lines, or "
                    "choose another name=…."
                )

    def of(self, row: Row, cell: design.Cell) -> list[Line]:
        """Returns the lines of a row in a cell."""
        return [
            line
            for line in self.lines.values()
            if (line["row"], line["task"], line["point"]) == (row.name, cell.task, cell.point)
        ]

    def missing(self, row: Row, cell: design.Cell) -> list[int]:
        """Returns the seeds that miss a line: that of the run, or of an evaluation."""
        has = {(line["seed"], line["evaluation"]) for line in self.of(row, cell)}
        wanted = (None, *self.study.evaluations)
        return [seed for seed in range(self.sweep.seeds) if any((seed, each) not in has for each in wanted)]

    def do(self, row: Row, cell: design.Cell) -> None:
        """Runs what a row misses in a cell."""
        wanted = self.missing(row, cell)
        if not wanted:
            return
        if (start := design.starts(row)) is not None:
            pretune(design.sweep_of(self.config, cell), start)
        chosen = self.chosen(row, cell)
        sweep, inside = design.sweep_of(self.config, cell), design.in_cell(row, cell)
        for seed in wanted:
            final = make_final(sweep, inside, chosen["chosen"], seed)
            line = chosen | {
                "study": self.config.name, "task": cell.task, "row": row.name, "point": cell.point,
                "seed": seed, "evaluation": None, "settings": design.digest(self.config, row, cell),
            }  # fmt: skip
            if key_of(line) not in self.lines:
                self.add(
                    line | self.figures(run(final, "tune", resume=True)),
                    final.folder / run_folder.PREDICTIONS,
                )
                shutil.rmtree(final.folder / run_folder.CHECKPOINTS, ignore_errors=True)
            for name, settings in self.study.evaluations.items():
                again = {**self.lines[key_of(line)], "evaluation": name}
                if key_of(again) not in self.lines:
                    self.evaluate(again, final, settings)

    def chosen(self, row: Row, cell: design.Cell) -> Line:
        """Returns what the validation split has chosen, by a line or the grid."""
        at = design.searched(self.config, cell)
        known = self.of(row, at) + self.of(row, cell)
        if known:
            return {name: known[0][name] for name in ("chosen", "select_by", "validation")}
        choice = choose(design.sweep_of(self.config, at), design.in_cell(row, at))
        for each in (design.sweep_of(self.config, at).folder / "search" / row.name).glob(
            f"*/{run_folder.CHECKPOINTS}"
        ):
            shutil.rmtree(each)
        return {"chosen": choice.point, "select_by": choice.by, "validation": choice.best}

    def evaluate(self, line: Line, final: RunConfig, settings: Settings) -> None:
        """Measures a finished run on the test split with settings on top."""
        if not (final.folder / run_folder.ADAPTER).is_dir():
            raise ValueError(f"{final.folder} is gone; delete the lines of {line['row']} to train it again.")
        at = final.folder / f"{line['evaluation']}.jsonl"
        keep = at if final.task == "vision" else None
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        test = measure(final.folder, overrides, "test", keep)
        self.add(line | {"test": _numbers(test)}, at)

    def add(self, line: Line, predictions: Path) -> None:
        """Writes what is known of the pictures, then the line."""
        line = dict(line)
        line.pop("pictures", None)
        if predictions.is_file():
            at = pictures_path(self.results, line)
            write_pictures(at, predictions)
            line["pictures"] = str(at.relative_to(self.results))
        append_line(self.path, line)
        self.lines[key_of(line)] = line
        self.added += 1
        self.console.print(as_text(line), highlight=False, markup=False)

    def figures(self, result: dict[str, Any]) -> Line:
        """Returns what a line keeps of a run's result, and of the machine."""
        return figures(result) | ({"processes": self.processes} if self.processes > 1 else {})


def as_text(line: Line) -> str:
    """Returns a line as it is printed."""
    shown = ", ".join(f"{name} {value:.4f}" for name, value in line["test"].items())
    where = [line["task"], line["point"], line["row"], f"seed {line['seed']}", line["evaluation"]]
    return " · ".join(str(part) for part in where if part is not None) + f": {shown}"


def figures(result: dict[str, Any]) -> Line:
    """Returns what a line keeps of a run's result, and of the machine."""
    samples = result["samples"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "test": _numbers(result["test"] or {}),
        "trained_on": (samples.get("images") or samples.get("rows") or {}).get("train"),
        "steps": result["steps"],
        "step_seconds": round(result["step_seconds"] / result["steps"], 5),
        "median_step_seconds": result["median_step_seconds"],
        "seconds": result["seconds"],
        "trainable_parameters": result["trainable_parameters"],
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"toast": toast.__version__, "torch": torch.__version__},
    }


def _numbers(measured: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in measured.items() if isinstance(value, float)}

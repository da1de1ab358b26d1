"""What a study is made of: a cell for each task and each value of its curve, each a sweep."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from toast.training.config_files import read_yaml
from toast.training.run_config import RunConfig
from toast.training.sweeping import Row, Settings, make_row, pretunings

#: Settings of a run that its figures do not depend on, beside those that make the runs of a sweep differ.
_NO_MATTER = {"name", "out", "sweep", "study", "stage", "checkpoint", "first_pass", "log_every", "trackers"}


@dataclass(frozen=True)
class Cell:
    """One task at one value of the curve.

    Args:
        task: Name of the task.
        point: Value of the curve; None if there is no curve.
        settings: What makes it, by dotted name.
    """

    task: str
    point: Any
    settings: Settings

    @property
    def name(self) -> str:
        """What it is called in folders and headings."""
        if self.point is None:
            return self.task
        return f"{self.task}, {curve_name(next(reversed(self.settings)))} {self.point}"


def curve_name(setting: str) -> str:
    """Returns the last part of a dotted name, in words."""
    return setting.rpartition(".")[2].replace("_", " ")


def cells(config: RunConfig, only: tuple[str, ...] = ()) -> list[Cell]:
    """Returns the cells of a study, tasks outermost, or those whose tasks match a pattern.

    Raises:
        ValueError: If the file has no section `study`, a pattern matches no task, or the curve leaves out the
            value to choose at.
    """
    study = config.study
    if study is None:
        raise ValueError("study: needs a section, such as study: {reference: LoRA}; see StudyConfig.")
    tasks = study.tasks or {config.name: {}}
    named = _matching(tasks, only, "task")
    key, values = next(iter(study.curve.items()), ("", [None]))
    if study.choose_at is not None and study.choose_at not in values:
        raise ValueError(f"study.choose_at: needs a value of the curve, {values}; got {study.choose_at!r}.")
    return [
        Cell(task, value, tasks[task] | ({key: value} if key else {}))
        for task, value in itertools.product(named, values)
    ]


def searched(config: RunConfig, cell: Cell) -> Cell:
    """Returns the cell that the grid is searched in for a cell."""
    assert config.study is not None
    at = config.study.choose_at
    if at is None:
        return cell
    return replace(cell, point=at, settings=cell.settings | {next(iter(config.study.curve)): at})


def rows(config: RunConfig, only: tuple[str, ...] = ()) -> list[Row]:
    """Returns the rows of a study, or those whose names match a pattern.

    Raises:
        ValueError: If a pattern matches none, the reference is no row, or a grid searches what makes a cell.
    """
    spec, study = config.checked_sweep(), config.study
    assert study is not None
    made = [make_row(name, settings, spec) for name, settings in spec.rows.items()]
    names = [row.name for row in made]
    if study.reference is not None and study.reference not in names:
        raise ValueError(f"study.reference: needs one of {', '.join(names)}; got {study.reference!r}.")
    wanted = _matching(names, only, "only")
    set_by_cells = {key for cell in cells(config) for key in cell.settings}
    for row in made:
        if both := set_by_cells & set(row.grid):
            raise ValueError(f"sweep.rows.{row.name}: the grid searches {', '.join(both)}, which cells set.")
    return [row for row in made if row.name in wanted]


def _matching(names: Iterable[str], patterns: tuple[str, ...], option: str) -> list[str]:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{option}: {pattern!r} matches none of {', '.join(names)}.")
    return [name for name in names if not patterns or any(fnmatchcase(name, each) for each in patterns)]


def in_cell(row: Row, cell: Cell) -> Row:
    """Returns a row with the settings of a cell on top."""
    return replace(row, settings={**row.settings, **cell.settings})


def sweep_of(config: RunConfig, cell: Cell) -> RunConfig:
    """Returns the sweep of a cell; all of a study share pre-tunings and stored first passes."""
    spec = config.checked_sweep()
    name = "all" if cell.point is None else f"{cell.point}"
    evaluation = config.evaluation.model_copy(update={"predictions": config.task == "vision"})
    return config.model_copy(
        update={
            "out": config.folder / cell.task,
            "name": name.replace("/", "_"),
            "evaluation": evaluation,
            "sweep": spec.model_copy(update={"shared": spec.shared or config.folder}),
        }
    )


def starts(row: Row) -> str | None:
    """Returns the name of the pre-tuning that a row starts from; None if it starts from none."""
    method = row.settings.get("method")
    start = row.settings.get("method.start", method.get("start") if isinstance(method, dict) else None)
    parts = Path(str(start)).parts
    return "/".join(parts[1:]) if parts[:1] == ("pretune",) else None


def digest(config: RunConfig, row: Row, cell: Cell) -> str:
    """Returns what tells a row's settings in a cell from others: all that is not as by default.

    Seeds, folders and further evaluations are not in it, nor where on a machine files lie.
    """
    spec, start = config.checked_sweep(), starts(row)
    held: dict[str, Any] = {
        "shared": config.model_dump(mode="json", exclude=_NO_MATTER, exclude_defaults=True),
        "row": row.settings,
        "cell": cell.settings,
        "grid": row.grid,
        "searched": searched(config, cell).settings,
        "final": spec.final,
        "select_by": spec.select_by,
    }
    if start is not None:
        at, settings = pretunings(spec)[start]
        held["pretune"] = read_yaml(at) | {"on top": settings}
    if spec.search_seeds > 1 and row.only is None:
        held["search seeds"] = spec.search_seeds
    return hashlib.sha256(json.dumps(_anywhere(held), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _anywhere(value: Any) -> Any:
    """Returns settings whose folders are `$NAME` again where an environment variable names them."""
    if isinstance(value, dict):
        return {str(key): _anywhere(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_anywhere(held) for held in value]
    if not isinstance(value, str | PurePath):
        return value
    text = str(value)
    folders = {folder.rstrip("/"): name for name, folder in sorted(os.environ.items()) if "/" in folder}
    held = [folder for folder in folders if folder and text.startswith(f"{folder}/")]
    longest = max(held, key=len, default="")
    return f"${folders[longest]}{text[len(longest) :]}" if longest else text

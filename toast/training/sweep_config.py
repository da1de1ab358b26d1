"""The settings of a sweep and a study: grids, rows, tasks and curves around a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from toast.training.setting_types import SECTION, Integer, Name


class SweepConfig(BaseModel):
    """A grid, searched on the validation split, for several rows of settings; one point needs no search.

    Args:
        rows: Name of a row -> settings that make it, as dotted names; `grid` in a row replaces the grid.
        grid: Dotted name -> values, such as `optimizer.learning_rate: [1e-3, 3e-3]`.
        seeds: How often the chosen settings are trained on training and validation split together, and
            measured on the test split.
        search_seeds: How often each point of a grid is trained for the search; the mean counts.
        final: Settings of the runs that are measured, such as `data.train: trainval`. They train on what
            was held out, too, if these say so; `data.validation`, `data.validation_share`, `checkpoint.best`
            and `checkpoint.patience` are taken out.
        pretune: Configuration of the pre-tuning whose adapter rows name as `method.start: pretune`. Several:
            name -> configuration, or `{config: FILE, …}` with settings on top by dotted name; rows name one
            as `method.start: pretune/NAME`. One with `stage: tune` is trained with labels alone, such as a
            LoRA's.
        shared: Folder of pre-tunings and stored first passes, where several sweeps share them; None is the
            sweep's own.
        select_by: Measure of the validation split; the greatest wins, of `loss` and `perplexity` the least.
    """

    model_config = SECTION

    rows: dict[Name, dict[str, Any]]
    grid: dict[str, list[Any]] = {}
    seeds: Annotated[Integer, Field(gt=0)] = 3
    search_seeds: Annotated[Integer, Field(gt=0)] = 1
    final: dict[str, Any] = {}
    pretune: Path | dict[str, Path | dict[str, Any]] | None = None
    shared: Path | None = None
    select_by: str | None = None

    @model_validator(mode="after")
    def _has_points(self) -> SweepConfig:
        grids = {f"rows.{name}.grid": row["grid"] for name, row in self.rows.items() if "grid" in row}
        for name, grid in {"grid": self.grid, **grids}.items():
            lists = grid.values() if isinstance(grid, dict) else [None]
            if not all(isinstance(values, list) and values for values in lists):
                raise ValueError(
                    f"{name}: needs lists of values by dotted name, such as optimizer.learning_rate: "
                    f"[1e-3, 3e-3]; got {grid!r}"
                )
        return self

    @property
    def searches(self) -> bool:
        """Whether any row has a grid of several points, between which the validation split chooses."""
        grids = [settings.get("grid", self.grid) for settings in self.rows.values()]
        return any(math.prod(map(len, grid.values())) > 1 for grid in grids)


class StudyConfig(BaseModel):
    """A sweep on several tasks and along a curve, with tables that compare its rows.

    Args:
        tasks: Name -> settings that make the task, by dotted name; none is one task, that of the file.
        curve: One setting by dotted name, with its values, such as `data.options.train: [50, 200, 1000]`.
        choose_at: Value of the curve at which the grid is searched for all values; None searches at each.
        reference: Row that the others are compared with; None is the first.
        evaluations: Further measurements of every finished model on the test split: name -> settings on top,
            such as `{data.options.distractors: 8}`.
    """

    model_config = SECTION

    tasks: dict[str, dict[str, Any]] = {}
    curve: Annotated[dict[str, list[Any]], Field(max_length=1)] = {}
    choose_at: Any = None
    reference: str | None = None
    evaluations: dict[str, dict[str, Any]] = {}

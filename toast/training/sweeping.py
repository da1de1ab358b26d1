"""A grid for several rows of settings: searched on the validation split, measured once on the test split.

SWEEP/pretune/                 the pre-tuning that rows start from, if there is one; of several, pretune/NAME/
SWEEP/search/ROW/POINT/        a run of the grid; it never opens the test split; further seeds: POINT,seed-N/
SWEEP/final/ROW/POINT,seed-N/  a run with the chosen settings
SWEEP/sweep.json               the table with all figures; SWEEP/table.md to read
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from toast.evaluation.choosing import best_of
from toast.files.atomic import try_folder
from toast.training import run_folder
from toast.training.accelerating import make_accelerator
from toast.training.config_files import make_config, read_yaml
from toast.training.finite import Diverged
from toast.training.locking import locked
from toast.training.many_heads import choosing_of
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.shipped import find_config
from toast.training.sweep_config import SweepConfig

#: Columns of the table, where they were measured.
_SHOWN = (
    "accuracy", "attention_on_target", "selection_inside", "selection_outside", "selection_ratio",
    "calibration_error", "r2", "mae", "mean_average_precision", "loss", "perplexity",
    "exact_format", "line_f1",
)  # fmt: skip
#: What a run measures once, beside its test split.
_BESIDE = ("splits", "corrupted")
#: What no folder's name may hold.
_NO_NAME = re.compile(r"[/\\\x00\n]")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: Its name.
        settings: What makes it, by dotted name.
        grid: What is searched.
    """

    name: str
    settings: Settings
    grid: dict[str, list[Any]]

    def points(self) -> Iterator[Settings]:
        """Yields the settings of each point of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    @property
    def only(self) -> Settings | None:
        """The point of a grid that has but one, so that there is nothing to choose."""
        points = list(self.points())
        return points[0] if len(points) == 1 else None

    @property
    def searched(self) -> list[Settings]:
        """The points between which there is something to choose."""
        return list(self.points()) if self.only is None else []


@dataclass(frozen=True)
class Choice:
    """What the validation split chose for a row.

    Args:
        point: Settings of the best point of the grid.
        by: Measure that it was chosen by; None where the grid has one point, which needs no search.
        searched: The measure at every point, in the grid's order; with several seeds their mean.
        best: The best of them.
    """

    point: Settings
    by: str | None = None
    searched: list[float] = field(default_factory=list)
    best: float | None = None


def sweep(config: RunConfig, dry_run: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Runs a sweep; what is done already is not done again.

    Args:
        config: What all runs share, with the section `sweep`.
        dry_run: List the runs and stop.
        console: Where the table is printed; None is the standard output.

    Returns:
        What `sweep.json` holds.

    Raises:
        ValueError: If there is no such section, or a run's settings do not fit; before the first run.
        Interrupted: If a signal came; call it again to go on.
    """
    spec, console = config.checked_sweep(), console or Console(soft_wrap=True)
    place = config.folder
    rows = [make_row(name, settings, spec) for name, settings in spec.rows.items()]
    searches = {
        row.name: [each for point in row.searched for each in _searches(config, row, point)] for row in rows
    }
    # The chosen point of a search is not known yet; what its finals share with these is checked.
    finals = {
        row.name: [make_final(config, row, row.only or {}, seed) for seed in range(spec.seeds)]
        for row in rows
    }
    if dry_run:
        for each in [*itertools.chain(*searches.values()), *itertools.chain(*finals.values())]:
            console.print(str(each.folder), highlight=False)
        return {}
    try_folder(place, "out")
    with locked(make_accelerator(config), place):
        return _search_and_measure(config, spec, rows, console)


def _search_and_measure(
    config: RunConfig, spec: SweepConfig, rows: list[Row], console: Console
) -> dict[str, Any]:
    place = config.folder
    for name in pretunings(spec):
        pretune(config, name)
    table: dict[str, Any] = {}
    failed: list[str] = []
    for row in rows:
        try:
            choice = choose(config, row)
        except NoChoice as error:
            failed.append(str(error))
            continue
        finals = [make_final(config, row, choice.point, seed) for seed in range(spec.seeds)]
        ended = [result for result in map(_tried, finals) if result is not None]
        if not ended:
            failed.append(f"sweep.rows.{row.name}: the chosen point diverged with every seed: {choice.point}")
            continue
        table[row.name] = _line(choice, ended)
        run_folder.write_json(
            place / run_folder.SWEEP, {"name": config.name, "seeds": spec.seeds, "rows": table}
        )
        run_folder.write_text(place / "table.md", as_markdown(table))
        found = "" if choice.best is None else f", {choice.by} {choice.best:.4f} of the validation split"
        console.print(f"{row.name}: {choice.point}{found}", highlight=False)
    if failed:
        raise ValueError("\n".join([*failed, f"The other rows are in {place}."]))
    console.print(as_markdown(table), highlight=False, markup=False)
    console.print(f"{place}/table.md, {place}/sweep.json", highlight=False)
    return {"name": config.name, "seeds": spec.seeds, "rows": table}


def choose(config: RunConfig, row: Row) -> Choice:
    """Runs a row's grid, as far as it is not done, and returns the point that the validation split chose.

    A grid of one point is not run.

    Raises:
        NoChoice: If no point has a finite measure.
    """
    assert config.sweep is not None
    if row.only is not None:
        return Choice(row.only)
    points = row.searched
    by = config.sweep.select_by or choosing_of(config)
    values = []
    for point in points:
        found = [_tried(each) for each in _searches(config, row, point)]
        each = [math.nan if result is None else _measure(result, "validation", by) for result in found]
        values.append(sum(each) / len(each))  # not a number if a seed diverged: such a point is not chosen
    best = best_of(values, by)
    if best is None:
        raise NoChoice(
            f"sweep.rows.{row.name}: at every point a run diverged, or measured no finite {by} on the "
            "validation split. Give its grid lower learning rates"
        )
    return Choice(points[best], by, values, values[best])


class NoChoice(ValueError):
    """No point of a row's grid can be chosen."""


def _tried(config: RunConfig) -> dict[str, Any] | None:
    """Returns a run's result; None if it diverged, which is reported and ends no sweep."""
    try:
        return run(config, "tune", resume=True)
    except Diverged as stopped:
        tqdm.write(f"{config.folder} diverged: {stopped}")
        return None


def pretunings(spec: SweepConfig) -> dict[str, tuple[Path, Settings]]:
    """Returns configuration file and settings on top of each pre-tuning; a single one has no name."""
    if spec.pretune is None:
        return {}
    given = spec.pretune if isinstance(spec.pretune, dict) else {"": spec.pretune}
    made: dict[str, tuple[Path, Settings]] = {}
    for name, each in given.items():
        settings = dict(each) if isinstance(each, dict) else {"config": each}
        if "config" not in settings:
            raise ValueError(f"sweep.pretune.{name}: needs config: FILE; got {', '.join(settings)}.")
        at = find_config(Path(settings.pop("config")))
        if not at.is_file():
            raise ValueError(f"sweep.pretune: {at} does not exist; needs the YAML file of a pre-tuning.")
        made[name] = at, settings
    return made


def pretune(config: RunConfig, name: str) -> None:
    """Does a pre-tuning, if it is not done."""
    assert config.sweep is not None
    at, settings = pretunings(config.sweep)[name]
    made = make_config(read_yaml(at), settings.items(), str(at))
    out = _shared(config) / "pretune" / name
    run(made.model_copy(update={"out": out.parent, "name": out.name}), made.stage or "pretune", resume=True)


def _shared(config: RunConfig) -> Path:
    return (config.sweep and config.sweep.shared) or config.folder


def make_row(name: str, settings: Settings, spec: SweepConfig) -> Row:
    """Returns a row of a sweep's section."""
    settings = dict(settings)
    grid = settings.pop("grid", spec.grid)
    return Row(name, settings, grid)


def _named(point: Settings) -> str:
    name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    name = _NO_NAME.sub("_", name)
    # A file's name has at most 255 bytes on most systems, and the seed is still to come.
    return name if len(name.encode()) <= 150 else f"{name[:60]}…{zlib.crc32(name.encode()):08x}"


def _searches(config: RunConfig, row: Row, point: Settings) -> list[RunConfig]:
    """Returns the runs that measure a point of the grid on the validation split, one for each seed."""
    assert config.sweep is not None
    own: Settings = {
        "data.test": None, "data.test_share": 0.0, "evaluation.splits": [],
        "evaluation.corruptions": {}, "evaluation.corruption": None,
    }  # fmt: skip
    place, name = config.folder / "search" / row.name, _named(point) or "all"
    first = _made(config, {**row.settings, **point, **own}, place, name)
    seeds = range(first.seed + 1, first.seed + config.sweep.search_seeds)
    return [
        first,
        *(
            _made(config, {**row.settings, **point, **own, "seed": seed}, place, f"{name},seed-{seed}")
            for seed in seeds
        ),
    ]


def make_final(config: RunConfig, row: Row, point: Settings, seed: int) -> RunConfig:
    """Returns the run that trains a row with chosen settings and opens the test split."""
    assert config.sweep is not None
    own = {
        "data.validation": None, "data.validation_share": 0.0, "checkpoint.best": None,
        "checkpoint.patience": None, **config.sweep.final, "seed": seed,
    }  # fmt: skip
    name = f"{_named(point)},seed-{seed}" if point else f"seed-{seed}"
    return _made(config, {**row.settings, **point, **own}, config.folder / "final" / row.name, name)


def _made(config: RunConfig, settings: Settings, out: Path, name: str) -> RunConfig:
    shared = config.model_dump(mode="json", exclude={"sweep", "study", "stage"})
    stored = config.first_pass.folder or _shared(config) / "first-pass"
    places = {"out": str(out), "name": name, "first_pass.folder": str(stored)}
    if {"epochs", "steps"} & settings.keys():
        shared |= {"epochs": None, "steps": None}
    made = make_config(shared, [*settings.items(), *places.items()], f"sweep.rows.{out.name}")
    start = made.method.start
    if start is not None and start.parts[:1] == ("pretune",):
        assert config.sweep is not None
        name, known = "/".join(start.parts[1:]), pretunings(config.sweep)
        if name not in known:
            has = ", ".join(known) if any(known) else "one without a name" if known else "no file"
            raise ValueError(
                f"sweep.rows.{out.name}: method.start is {start}, but sweep.pretune names {has}."
            )
        start = _shared(config) / start / run_folder.ADAPTER
        return made.model_copy(update={"method": made.method.model_copy(update={"start": start})})
    return made


def _measure(result: dict[str, Any], split: str, name: str) -> float:
    measured = result[split] or {}
    if name not in measured:
        raise ValueError(f"sweep.select_by: {name!r} was not measured; there are {', '.join(measured)}.")
    return math.nan if measured[name] is None else float(measured[name])


def _line(choice: Choice, ended: list[dict[str, Any]]) -> dict[str, Any]:
    beside = {name: _over_seeds([result[name] for result in ended]) for name in _BESIDE if name in ended[0]}
    return {
        "chosen": choice.point,
        "select_by": choice.by,
        "searched": choice.searched,
        "validation": choice.best,
        "test": _over_seeds([result["test"] or {} for result in ended]),
        **beside,
        "trainable_parameters": ended[0]["trainable_parameters"],
        "step_seconds": statistics.mean(result["step_seconds"] for result in ended),
    }


def _over_seeds(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean, standard deviation and values of every figure, however deep it stands."""
    table: dict[str, Any] = {}
    for name, value in measured[0].items():
        held = [each[name] for each in measured if name in each]
        if isinstance(value, dict):
            table[name] = _over_seeds(held)
        elif all(isinstance(each, float) for each in held) and len(held) == len(measured):
            deviation = statistics.stdev(held) if len(held) > 1 else 0.0
            table[name] = {"mean": statistics.mean(held), "deviation": deviation, "seeds": held}
    return table


def as_markdown(table: dict[str, Any]) -> str:
    """Returns the table: what was chosen, and each measure's mean and standard deviation over the seeds."""
    measured = dict.fromkeys(name for line in table.values() for name in line["test"])
    # Of several heads, a figure has the head's name before a dot.
    shown = [name for last in _SHOWN for name in measured if name.rpartition(".")[2] == last]
    head = ["", "chosen", "validation", *(name.replace("_", " ") for name in shown), "trained", "s"]
    lines = [head, ["---"] * len(head)]
    for name, line in table.items():
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in line["chosen"].items())
        cells = [_of_seeds(line["test"].get(measure)) for measure in shown]
        lines.append(
            [
                name,
                chosen,
                "–" if line["validation"] is None else f"{line['validation']:.3f}",
                *cells,
                f"{line['trainable_parameters']:,}",
                f"{line['step_seconds']:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _of_seeds(held: dict[str, Any] | None) -> str:
    return "–" if held is None else f"{held['mean']:.3f} ± {held['deviation']:.3f}"

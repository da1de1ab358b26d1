"""A grid for several rows of settings: searched on the validation split, measured once on the test split.

SWEEP/pretune/                 the pre-tuning that rows start from, if there is one
SWEEP/search/ROW/POINT/        a run of the grid; it never opens the test split
SWEEP/final/ROW/POINT,seed-N/  a run with the chosen settings
SWEEP/sweep.json               the table with all figures; SWEEP/table.md to read
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from toast.files import try_folder
from toast.training import folder
from toast.training.accelerating import make_accelerator
from toast.training.config import RunConfig, SweepConfig
from toast.training.finite import Diverged
from toast.training.loading import load_config, make_config
from toast.training.locking import locked
from toast.training.run import run

#: Of these the least is the best.
_LESS_IS_BETTER = ("loss", "perplexity", "calibration_error")
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
    spec, console = config.sweep, console or Console(soft_wrap=True)
    if spec is None or not spec.rows:
        raise ValueError("sweep: needs a section with rows, such as rows: {lora: {method: lora}}.")
    if config.data.validation is None and not config.data.validation_share:
        raise ValueError(
            "sweep: needs a validation split to select on; set data.validation, or data.validation_share."
        )
    place = config.folder
    rows = [_row(name, settings, spec) for name, settings in spec.rows.items()]
    searches = {row.name: [_search(config, row, point) for point in row.points()] for row in rows}
    finals = {row.name: [_final(config, row, {}, seed) for seed in range(spec.seeds)] for row in rows}
    if dry_run:
        for each in [*itertools.chain(*searches.values()), *itertools.chain(*finals.values())]:
            console.print(str(each.folder), highlight=False)
        return {}
    try_folder(place, "out")
    with locked(make_accelerator(config), place):
        return _search_and_measure(config, spec, rows, searches, console)


def _search_and_measure(
    config: RunConfig,
    spec: SweepConfig,
    rows: list[Row],
    searches: dict[str, list[RunConfig]],
    console: Console,
) -> dict[str, Any]:
    place = config.folder
    if spec.pretune is not None:
        _pretune(spec.pretune, place)
    table: dict[str, Any] = {}
    failed: list[str] = []
    for row in rows:
        found = [_tried(search, console) for search in searches[row.name]]
        by = spec.select_by or ("accuracy" if config.task == "vision" else "loss")
        values = [math.nan if result is None else _measure(result, "validation", by) for result in found]
        best = best_of(values, by)
        if best is None:
            failed.append(row.name)
            continue
        point = list(row.points())[best]
        finals = [_final(config, row, point, seed) for seed in range(spec.seeds)]
        ended = [result for result in (_tried(final, console) for final in finals) if result is not None]
        if not ended:
            failed.append(row.name)
            continue
        table[row.name] = _line(point, by, values, best, ended)
        folder.write_json(place / "sweep.json", {"name": config.name, "seeds": spec.seeds, "rows": table})
        folder.write_text(place / "table.md", as_markdown(table))
        console.print(
            f"{row.name}: {point}, {by} {values[best]:.4f} of the validation split", highlight=False
        )
    if failed:
        raise ValueError(
            f"sweep: every run of {', '.join(failed)} diverged, or measured no finite {by} on the validation "
            f"split; the other rows are in {place}. Give sweep.rows.{failed[0]}.grid lower learning rates."
        )
    console.print(as_markdown(table), highlight=False, markup=False)
    console.print(f"{place}/table.md, {place}/sweep.json", highlight=False)
    return {"name": config.name, "seeds": spec.seeds, "rows": table}


def _tried(config: RunConfig, console: Console) -> dict[str, Any] | None:
    """Returns a run's result; None if it diverged, which is said and ends no sweep."""
    try:
        return run(config, "tune", resume=True)
    except Diverged as stopped:
        console.print(f"{config.folder} diverged: {stopped}", highlight=False, markup=False)
        return None


def best_of(values: Sequence[float], by: str) -> int | None:
    """Returns the place of the best finite value of a measure; None if no value is finite."""
    places = [place for place, value in enumerate(values) if math.isfinite(value)]
    if not places:
        return None
    return (min if by in _LESS_IS_BETTER else max)(places, key=values.__getitem__)


def _row(name: str, settings: Settings, spec: SweepConfig) -> Row:
    settings = dict(settings)
    grid = settings.pop("grid", spec.grid)
    return Row(name, settings, grid)


def _pretune(at: Path, place: Path) -> None:
    config = load_config(at)
    run(config.model_copy(update={"out": place, "name": "pretune"}), "pretune", resume=True)


def _named(point: Settings) -> str:
    name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    name = _NO_NAME.sub("_", name)
    # A file's name has at most 255 bytes on most systems, and the seed is still to come.
    return name if len(name.encode()) <= 150 else f"{name[:60]}…{zlib.crc32(name.encode()):08x}"


def _search(config: RunConfig, row: Row, point: Settings) -> RunConfig:
    name = _named(point) or "all"
    own = {"data.test": None, "data.test_share": 0.0}
    return _made(config, {**row.settings, **point, **own}, config.folder / "search" / row.name, name)


def _final(config: RunConfig, row: Row, point: Settings, seed: int) -> RunConfig:
    assert config.sweep is not None
    own = {"data.validation": None, "data.validation_share": 0.0, **config.sweep.final, "seed": seed}
    name = f"{_named(point)},seed-{seed}" if point else f"seed-{seed}"
    return _made(config, {**row.settings, **point, **own}, config.folder / "final" / row.name, name)


def _made(config: RunConfig, settings: Settings, out: Path, name: str) -> RunConfig:
    shared = config.model_dump(mode="json", exclude={"sweep", "stage"})
    stored = config.first_pass.folder or config.folder / "first-pass"
    places = {"out": str(out), "name": name, "first_pass.folder": str(stored)}
    if {"epochs", "steps"} & settings.keys():
        shared |= {"epochs": None, "steps": None}
    made = make_config(shared, [*settings.items(), *places.items()], f"sweep.rows.{out.name}")
    if made.method.start == Path("pretune"):
        assert config.sweep is not None
        if config.sweep.pretune is None:
            raise ValueError(
                f"sweep.rows.{out.name}: method.start is pretune, but sweep.pretune names no file."
            )
        start = config.folder / "pretune" / folder.ADAPTER
        return made.model_copy(update={"method": made.method.model_copy(update={"start": start})})
    return made


def _measure(result: dict[str, Any], split: str, name: str) -> float:
    measured = result[split] or {}
    if name not in measured:
        raise ValueError(f"sweep.select_by: {name!r} was not measured; there are {', '.join(measured)}.")
    return math.nan if measured[name] is None else float(measured[name])


def _line(
    point: Settings, by: str, values: list[float], best: int, ended: list[dict[str, Any]]
) -> dict[str, Any]:
    tests = [result["test"] or {} for result in ended]
    names = [name for name in tests[0] if all(isinstance(test.get(name), float) for test in tests)]
    measured = {name: [float(test[name]) for test in tests] for name in names}
    return {
        "chosen": point,
        "select_by": by,
        "searched": values,
        "validation": values[best],
        "test": {
            name: {
                "mean": statistics.mean(held),
                "deviation": statistics.stdev(held) if len(held) > 1 else 0.0,
                "seeds": held,
            }
            for name, held in measured.items()
        },
        "trainable_parameters": ended[0]["trainable_parameters"],
        "step_seconds": statistics.mean(result["step_seconds"] for result in ended),
    }


def as_markdown(table: dict[str, Any]) -> str:
    """Returns the table: what was chosen, and each measure's mean and standard deviation over the seeds."""
    shown = [
        name
        for name in ("accuracy", "attention_on_target", "calibration_error", "loss", "perplexity")
        if any(name in line["test"] for line in table.values())
    ]
    head = ["", "chosen", "validation", *(name.replace("_", " ") for name in shown), "trained", "s"]
    lines = [head, ["---"] * len(head)]
    for name, line in table.items():
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in line["chosen"].items())
        cells = [
            f"{line['test'][m]['mean']:.3f} ± {line['test'][m]['deviation']:.3f}" if m in line["test"] else ""
            for m in shown
        ]
        lines.append(
            [
                name,
                chosen,
                f"{line['validation']:.3f}",
                *cells,
                f"{line['trainable_parameters']:,}",
                f"{line['step_seconds']:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"

"""Tables of a study, made from its lines alone: nothing is run, and no number is written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toast.study import design
from toast.study.lines import Line, OfPictures, have_one_clock, pace, read_lines, read_pictures
from toast.study.statistics import (
    Array,
    Difference,
    by_quintile,
    correlation,
    paired_bootstrap,
    rank_correlation,
)
from toast.training.run_config import RunConfig
from toast.visual.targets import ATTENTION, RATIO

#: Of fewer rows a correlation says nothing: of two it is 1 or -1.
ROWS_TO_CORRELATE = 4


@dataclass(frozen=True)
class Measured:
    """What the seeds of a row gave in a cell.

    Args:
        row: The row's name.
        lines: A line a seed, in the order of the seeds.
        pictures: Of each, what is known of the pictures; empty where a task has none.
    """

    row: str
    lines: list[Line]
    pictures: list[OfPictures]

    def values(self, name: str) -> list[float]:
        """Returns a measure of every seed; empty if one has it not."""
        held = [line["test"].get(name) for line in self.lines]
        return [] if None in held else held

    def mean(self, name: str) -> float:
        """Returns a measure's mean over the seeds; not a number if it was not measured."""
        values = self.values(name)
        return statistics.mean(values) if values else float("nan")

    def correct(self) -> Array:
        """Returns for each seed and picture whether the answer was right, `(seeds, pictures)`."""
        return _correct(self.pictures)

    def attention(self) -> Array:
        """Returns for each seed and picture the share of attention on its target."""
        return np.stack([each.attention for each in self.pictures]).astype(float)


def measured(config: RunConfig, lines: Sequence[Line], cell: design.Cell, results: Path) -> list[Measured]:
    """Returns the rows of a cell that have lines, in the file's order."""
    found = []
    for row in design.rows(config):
        own = [
            line
            for line in lines
            if (line["row"], line["task"], line["point"]) == (row.name, cell.task, cell.point)
        ]
        own.sort(key=lambda line: line["seed"])
        if own:
            pictures = [read_pictures(results / line["pictures"]) for line in own if "pictures" in line]
            found.append(Measured(row.name, own, pictures if len(pictures) == len(own) else []))
    return found


def against(row: Measured, reference: Measured) -> Difference | None:
    """Returns how much more accurate a row is than another, by the seeds of both; None if unknown."""
    common = {line["seed"] for line in row.lines} & {line["seed"] for line in reference.lines}
    if row.row == reference.row or not common or not (row.pictures and reference.pictures):
        return None
    first, second = (
        [pictures for line, pictures in zip(each.lines, each.pictures, strict=True) if line["seed"] in common]
        for each in (row, reference)
    )
    for one, other in zip(first, second, strict=True):
        if not np.array_equal(one.index, other.index):
            raise ValueError(f"{row.row}, {reference.row}: were measured on different pictures.")
    return paired_bootstrap(_correct(first), _correct(second))


def _correct(pictures: Sequence[OfPictures]) -> Array:
    return np.stack([each.correct for each in pictures]).astype(float)


def _spread(name: str, digits: int = 3) -> Callable[[Measured], str]:
    def cell(row: Measured) -> str:
        values = row.values(name)
        if not values:
            return ""
        text = f"{statistics.mean(values):.{digits}f}"
        return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text

    return cell


def _chosen(row: Measured) -> str:
    chosen = row.lines[0]["chosen"]
    return ", ".join(f"{design.curve_name(key)} {value}" for key, value in chosen.items())


def _validation(row: Measured) -> str:
    value = row.lines[0]["validation"]
    return "" if value is None else f"{value:.3f}"


#: Columns of the main table; one that says nothing of any row is left out.
COLUMNS: dict[str, Callable[[Measured], str]] = {
    "": lambda row: row.row,
    "chosen": _chosen,
    "validation": _validation,
    "accuracy": _spread("accuracy"),
    "perplexity": _spread("perplexity", 2),
    "exact format": _spread("exact_format"),
    "line F1": _spread("line_f1"),
    "loss": _spread("loss"),
    "attention on target": _spread(ATTENTION),
    "weight in / out": _spread(RATIO, 2),
    "trained": lambda row: f"{row.lines[0]['trainable_parameters']:,}",
    "steps": lambda row: str(row.lines[0]["steps"]),
    "s per step": lambda row: (
        f"{statistics.median(map(pace, row.lines)):.3f}" if have_one_clock(row.lines) else ""
    ),
    "seeds": lambda row: str(len(row.lines)),
}
_DIFFERENCE_AFTER = "accuracy"


def main_table(rows: Sequence[Measured], reference: str) -> str:
    """Returns the table of a cell, with each row's difference to the reference."""
    columns = {head: [cell(row) for row in rows] for head, cell in COLUMNS.items()}
    base = next((row for row in rows if row.row == reference), None)
    laid_out: dict[str, list[str]] = {}
    for head, cells in columns.items():
        if any(cells):
            laid_out[head] = cells
        if head == _DIFFERENCE_AFTER and base is not None:
            laid_out[f"vs. {reference}"] = [_signed(against(row, base)) for row in rows]
    return markdown(list(laid_out), list(zip(*laid_out.values(), strict=True)))


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def curve_table(cells: Sequence[design.Cell], held: Sequence[list[Measured]], measure: str) -> str:
    """Returns a measure of every row at every value of the curve; empty if nothing has it."""
    names = list(dict.fromkeys(row.row for rows in held for row in rows))
    show = _spread(measure)
    lines = []
    for name in names:
        found = [next((show(row) for row in rows if row.row == name), "") for rows in held]
        lines.append((name, *found))
    if not any(any(line[1:]) for line in lines):
        return ""
    return markdown(["", *(str(cell.point) for cell in cells)], lines)


def explained(rows: Sequence[Measured]) -> str:
    """Returns whether attention on target goes with accuracy, over rows and pictures; empty if unknown."""
    known = [row for row in rows if row.pictures and not np.isnan(row.attention()).all()]
    if not known:
        return ""
    attention = np.array([row.mean(ATTENTION) for row in known])
    accuracy = np.array([row.mean("accuracy") for row in known])
    lines = []
    for row in known:
        shares, correct = row.attention().ravel(), row.correct().ravel()
        has = ~np.isnan(shares)
        parts = by_quintile(shares[has], correct[has])
        lines.append(
            (row.row, *(f"{v:.3f}" for v in parts), f"{correlation(shares[has], correct[has]):+.3f}")
        )
    head = ["accuracy by fifth of attention on target", "least", "2", "3", "4", "most", "correlation"]
    table = markdown(head, lines)
    if len(known) < ROWS_TO_CORRELATE:
        return table
    by = correlation(attention, accuracy)
    over = f"Over {len(known)} rows the mean attention on target and the accuracy "
    if np.isnan(by):
        over += "cannot be correlated: one of them does not vary."
    else:
        over += f"correlate by {by:+.2f} (ranks: {rank_correlation(attention, accuracy):+.2f})."
    return f"{over}\n\n{table}"


def _r(x: Array, y: Array) -> str:
    value = correlation(x, y)
    return "" if np.isnan(value) else f"{value:+.3f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def page(config: RunConfig, results: Path) -> str:
    """Returns all tables of a study.

    Raises:
        ValueError: If it has no lines yet, or they name files that are gone.
    """
    study, path = config.study, results / f"{config.name}.jsonl"
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} holds no lines yet; run the study first.")
    cells = design.cells(config)
    assert study is not None
    reference = study.reference or design.rows(config)[0].name
    parts = [f"# {config.name}\n"]
    for evaluation in (None, *study.evaluations):
        own = [line for line in lines if line["evaluation"] == evaluation]
        held = {cell.name: measured(config, own, cell, results) for cell in cells}
        title = "" if evaluation is None else f", measured at {evaluation}"
        for cell in cells:
            rows = held[cell.name]
            if rows:
                parts += [f"## {cell.name}{title}\n", main_table(rows, reference), explained(rows)]
        parts += _curves(study.curve, cells, held, title)
    return "\n".join(part for part in parts if part)


def _curves(
    curve: dict[str, Any], cells: Sequence[design.Cell], held: dict[str, list[Measured]], title: str
) -> list[str]:
    parts = []
    for setting in curve:
        for task in dict.fromkeys(cell.task for cell in cells):
            along = [cell for cell in cells if cell.task == task]
            for measure in ("accuracy", ATTENTION, "perplexity"):
                if table := curve_table(along, [held[cell.name] for cell in along], measure):
                    shown = measure.replace("_", " ")
                    parts += [f"## {task}{title}: {shown} by {design.curve_name(setting)}\n", table]
    return parts

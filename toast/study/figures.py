"""Figures of a study: curves with the seeds' spread, or rows by what they cost and where they look."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toast.files.atomic import beside
from toast.study import design
from toast.study.lines import have_one_clock, pace, read_lines
from toast.study.tables import Measured, measured
from toast.training.run_config import RunConfig

Value = Callable[[design.Cell, Measured], Any]


def _seconds(cell: design.Cell, row: Measured) -> float:
    return float(statistics.median(pace(line) * line["steps"] for line in row.lines))


def _of(name: str) -> Value:
    return lambda cell, row: row.mean(name)


SECONDS = "seconds of training"
#: Name of the x axis -> its value. The first is drawn where there is a curve alone.
ALONG: dict[str, Value] = {
    "curve": lambda cell, row: cell.point,
    SECONDS: _seconds,
    "attention on target": _of("attention_on_target"),
}


def draw(config: RunConfig, results: Path, suffix: str = ".png") -> list[Path]:
    """Draws a figure for each task of a study: accuracy, or perplexity of text, against each of `ALONG`.

    Seconds are left out where runs of several devices cannot be compared by them.

    Args:
        config: The study's file.
        results: Folder of its lines; figures are written beside them, `NAME-TASK.png`.
        suffix: `.png` or `.svg`.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study = config.study
    assert study is not None
    measure = "accuracy" if config.task == "vision" else "perplexity"
    lines = [line for line in read_lines(results / f"{config.name}.jsonl") if line["evaluation"] is None]
    drawn = []
    for task in dict.fromkeys(cell.task for cell in design.cells(config)):
        cells = [cell for cell in design.cells(config) if cell.task == task]
        held = [(cell, measured(config, lines, cell, results)) for cell in cells]
        names = list(dict.fromkeys(row.row for _, rows in held for row in rows))
        if not names:
            continue
        applies = {
            "curve": bool(study.curve),
            SECONDS: have_one_clock(line for _, rows in held for row in rows for line in row.lines),
            "attention on target": config.task == "vision",
        }
        along = {name: value for name, value in ALONG.items() if applies[name]}
        figure = Figure(figsize=(5 * len(along) + 3, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(along), squeeze=False)[0]
        for axis, (name, value) in zip(axes, along.items(), strict=True):
            for number, each in enumerate(names):
                _line(
                    axis, [(c, r) for c, rows in held for r in rows if r.row == each], value, measure, number
                )
            label = design.curve_name(next(iter(study.curve))) if name == "curve" else name
            axis.set(xlabel=label, ylabel=measure)
            _scale(axis)
            if name == SECONDS and axis.get_xscale() == "linear":
                axis.set_xlim(left=0)  # so that the noise of equal times looks like noise
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize="small")
        figure.suptitle(f"{config.name}: {task}" if task != config.name else task)
        at = results / f"{config.name}-{task}{suffix}".replace(" ", "-")
        with beside(at) as new:
            figure.savefig(new, format=suffix.removeprefix("."), dpi=120)
        drawn.append(at)
    return drawn


def _line(
    axis: Any, held: list[tuple[design.Cell, Measured]], value: Value, measure: str, number: int
) -> None:
    """Draws a row: its points, joined, with the standard deviation over the seeds."""
    x = [value(cell, row) for cell, row in held]
    seeds = [row.values(measure) for _, row in held]
    known = [place for place, values in enumerate(seeds) if values]
    if not known:
        return
    axis.errorbar(
        [x[place] for place in known],
        [statistics.mean(seeds[place]) for place in known],
        [statistics.stdev(seeds[place]) if len(seeds[place]) > 1 else 0.0 for place in known],
        label=held[0][1].row,
        color=f"C{number % 10}",
        linestyle=("-", "--", ":")[number // 10 % 3],
        marker="osD^v"[number // 10 % 5],
        capsize=2,
    )


def _scale(axis: Any) -> None:
    """Takes a logarithmic axis where values differ by more than a factor of 20."""
    points = [x for container in axis.containers for x in container[0].get_xdata()]
    numbers = [x for x in points if isinstance(x, (int, float)) or hasattr(x, "dtype")]
    if len(numbers) == len(points) > 0 and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axis.set_xscale("log")

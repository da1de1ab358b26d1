"""The curves of a run: losses, measures of the validation split, rate, norm of the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from toast.files.templates import render
from toast.report.charts import Axis, Series, averaged, chart, running
from toast.report.run_data import RunFiles

#: Measures of the validation split that have a chart of their own, and what they are called.
_MEASURES = {
    "accuracy": "Accuracy",
    "r2": "R²",
    "mean_average_precision": "Mean average precision",
    "token_accuracy": "Accuracy of the next token",
    "attention_on_target": "Attention on target",
    "selection_ratio": "Selection, inside the target over outside",
}


def curves(files: RunFiles) -> Markup:
    """Returns the section with the charts; nothing if the run has written no losses."""
    train, validation = files.split("train"), files.split("validation")
    steps = Axis("step", low=0, high=max(files.done, 1), whole=True)
    loss, called = ("loss", "Loss") if files.stage == "tune" else ("task", "Task loss")
    rate = [Series("", averaged(_points(train, "learning_rate")), "line", "b")]
    log = Axis("", log=True)
    made = [
        chart(
            called,
            [*_lines(train, loss, "train"), *_marked(validation, "loss", "validation")],
            steps,
            Axis("nats"),
        ),
        chart("Task loss of the first pass", _lines(train, "first_task", ""), steps, Axis("nats")),
        chart("Reconstruction loss", _lines(train, "reconstruction", ""), steps, log),
        *(
            chart(name, _marked(validation, key, ""), steps, Axis("validation split"))
            for key, name in _measures(validation)
            if len(_points(validation, key)) > 1
        ),
        chart("Learning rate", rate, steps, Axis("of the first group", low=0)),
        chart("Norm of the gradient", _lines(train, "gradient_norm", "", "b"), steps, log),
    ]
    drawn = [each for each in made if each]
    return render("report/templates/curves.html.jinja", charts=drawn) if drawn else Markup("")


def _measures(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields the measures that are drawn, with what they are called; of several heads, each head's."""
    keys = dict.fromkeys(key for row in rows for key in row)
    for name, called in _MEASURES.items():
        for key in keys:
            head, _, last = key.rpartition(".")
            if last == name:
                yield key, f"{head}: {called}" if head else called


def _lines(rows: Sequence[dict[str, Any]], key: str, name: str, colour: Any = "a") -> list[Series]:
    """Returns a loss of every step, faint, and its running mean."""
    points = averaged(_points(rows, key))
    return [Series("", points, "faint", colour), Series(name, running(points), "line", colour)]


def _marked(rows: Sequence[dict[str, Any]], key: str, name: str) -> list[Series]:
    points = _points(rows, key)
    return [Series(name, points, "marked", "b", [f"step {x:g}: {y:.4f}" for x, y in points])]


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]

"""What came out: figures, the sweep's other rows, classes, confusion and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from toast.evaluation.choosing import less_is_better
from toast.evaluation.intervals import wilson
from toast.evaluation.vision import BINS
from toast.files.templates import render
from toast.report.charts import Axis, Series, chart
from toast.report.elements import Cell
from toast.report.held_out import HeldOutLooks
from toast.report.run_data import RunFiles
from toast.visual.targets import INSIDE, OUTSIDE

#: Name of a measure -> what it is called, and its note.
_CALLED = {
    "accuracy": ("Accuracy", ""),
    "perplexity": ("Perplexity", ""),
    "top5_accuracy": ("Top 5", "the label is among the five likeliest"),
    "r2": ("R²", ""),
    "token_accuracy": ("Token accuracy", ""),
    "mae": ("Mean absolute error", "in the units of the targets"),
    "mean_average_precision": ("Mean average precision", ""),
    "loss": ("Loss", "nats"),
    "mean_class_accuracy": ("Mean of classes", "each class counts the same"),
    "calibration_error": ("Calibration error", "confidence against accuracy"),
    "attention_on_target": ("Attention on target", "share inside the frame, {targets}"),
    "exact_format": ("Exact format", "generated answers that ended and match whole"),
    "line_f1": ("F1 of lines", "of generated answers against the truth"),
    "selection_ratio": ("Selection on target", "{inside:.3f} inside the frame, {outside:.3f} outside"),
}
#: Of a sweep's table.
_COLUMNS = (
    "accuracy", "r2", "mae", "mean_average_precision", "perplexity", "exact_format", "line_f1",
    "attention_on_target", "selection_ratio", "calibration_error", "loss",
)  # fmt: skip
#: Most classes whose confusion is shown whole, and that have a bar each.
_MATRIX, _BARS = 20, 40


def results(files: RunFiles, looks: HeldOutLooks | None) -> Markup:
    """Returns the section with the figures; of a run that measured nothing, what is known."""
    split, measured = files.measured
    parts = {
        "figures": _figures(files, measured),
        "sweep": _beside(files),
        "by_class": [_by_class(*each) for each in _classified(files, measured)],
        "labels": [_by_label(*each) for each in _labelled(files, measured)],
        "calibration": _calibration(files, looks),
    }
    if not any(parts.values()):
        return Markup("")
    return render("report/templates/results.html.jinja", split=split, **parts)


def interval(measured: dict[str, Any]) -> tuple[float, float] | None:
    """Returns the 95% interval of an accuracy by the number of samples; None if that is not known."""
    accuracy, samples = measured.get("accuracy"), measured.get("samples")
    if accuracy is None or not samples:
        return None
    return wilson(accuracy, samples)


def _figures(files: RunFiles, measured: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns names, values and notes."""
    figures = []
    for key in named(measured, _CALLED):
        note = _CALLED[key.rpartition(".")[2]][1]
        if key.endswith("loss") and files.heads:
            note = "weighted sum of the heads'" if key == "loss" else "of this head"
        # The others stand at the head of the page.
        if note and not (key == "loss" and files.config.task == "language" and not files.heads):
            figures.append((called(key), files.from_before(key), note.format(**_of_targets(measured))))
    return figures


def named(measured: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Returns which of some figures were measured; those of several heads have the head's name before."""
    own = list(measured)
    return [key for name in wanted for key in own if key.rpartition(".")[2] == name]


def called(key: str) -> str:
    """Returns what a figure is called."""
    head, _, name = key.rpartition(".")
    return f"{head}: {_CALLED[name][0]}" if head else _CALLED[name][0]


def _of_targets(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns what the notes of the measures on targets say beside the figure."""
    seen, out = measured.get("targets_in_sight"), measured.get("targets_out_of_sight")
    count = "all pictures" if seen is None else f"{seen:,} pictures"
    if out:
        count += f"; of {out:,} it is cropped away"
    return {"targets": count, "inside": measured.get(INSIDE, 0.0), "outside": measured.get(OUTSIDE, 0.0)}


def _beside(files: RunFiles) -> dict[str, Any] | None:
    """Returns the table of the sweep, this run's row marked; None of a run that lies in none."""
    if files.sweep is None or not files.sweep.rows:
        return None
    rows, seeds = files.sweep.rows, files.sweep.seeds
    shown = named(dict.fromkeys(key for line in rows.values() for key in line["test"]), _COLUMNS)
    best = {
        key: (min if less_is_better(key) else max)(
            line["test"][key]["mean"] for line in rows.values() if key in line["test"]
        )
        for key in shown
    }
    lines = [
        [
            name,
            *(_of_seeds(line["test"].get(key), key, best[key], seeds) for key in shown),
            f"{line['trainable_parameters']:,}",
            f"{line['step_seconds']:.0f}",
        ]
        for name, line in rows.items()
    ]
    here = list(rows).index(files.sweep.row) if files.sweep.row in rows else None
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return {
        "name": files.sweep.name,
        "spread": spread,
        "missing": files.sweep.row if here is None else "",
        "head": ["", *(called(key).lower() for key in shown), "trained", "s"],
        "rows": lines,
        "marked": here,
    }


def _of_seeds(entry: dict[str, Any] | None, key: str, best: float, seeds: int) -> str | Cell:
    if entry is None:
        return "–"
    return Cell(
        f"{entry['mean']:.3f}",
        note=f"± {entry['deviation']:.3f}" if seeds > 1 else "",
        share=max(0.0, entry["mean"])
        if key.rpartition(".")[2] in ("accuracy", "attention_on_target")
        else None,
        is_best=entry["mean"] == best,
    )


def _classified(files: RunFiles, measured: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], Any]]:
    """Yields, of the classes and of each head that has some: its name, theirs, and the figures."""
    for head, names, found in _of_heads(files, measured, "classes"):
        if "class_accuracy" in found and len(names) == len(found["class_accuracy"]):
            yield head, names, found


def _labelled(files: RunFiles, measured: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], Any]]:
    """Yields the same of each head with several labels."""
    for head, names, found in _of_heads(files, measured, "multilabel"):
        if "label_average_precision" in found:
            yield head, names, found


def _of_heads(
    files: RunFiles, measured: dict[str, Any], kind: str
) -> Iterator[tuple[str, Sequence[str], dict[str, Any]]]:
    if files.heads is None:
        yield "", files.classes, measured
    for head, record in (files.heads or {}).items():
        if record["kind"] == kind:
            before = f"{head}." if len(files.heads or ()) > 1 else ""
            found = {k.removeprefix(before): value for k, value in measured.items() if k.startswith(before)}
            yield head if before else "", record["outputs"], found


def _by_label(head: str, names: Sequence[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Returns a bar for each label."""
    title = f"{head}: by label" if head else "By label"
    shares = zip(names, measured["label_average_precision"], strict=True)
    rows = [(name, "–" if held is None else Cell(f"{held:.3f}", share=held)) for name, held in shares]
    return {"title": title, "head": ["", "average precision"], "rows": rows}


def _by_class(head: str, names: Sequence[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Returns accuracy and confusion of classes."""
    classes = _classes(names, measured)
    if head:
        classes["title"] = f"{head}: {classes['title'][0].lower()}{classes['title'][1:]}"
    return {"classes": classes, **_confusion(names, measured)}


def _classes(names: Sequence[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Returns a bar for each class; of many the best and the worst first, all to unfold."""
    counts = [sum(row) for row in measured["confusion"]]
    rows = [
        (name, Cell(f"{share:.3f}", share=share), "{:.2f}–{:.2f}".format(*wilson(share, count)), f"{count:,}")
        for name, share, count in zip(names, measured["class_accuracy"], counts, strict=True)
        if share is not None
    ]
    head = ["", "accuracy", "95%", "samples"]
    if len(rows) <= _BARS:
        return {"title": "By class", "head": head, "shown": [rows], "folded": []}
    shares = [share for share in measured["class_accuracy"] if share is not None]
    order = sorted(range(len(rows)), key=shares.__getitem__)
    ends = [rows[i] for i in order[:10]], [rows[i] for i in order[-10:]]
    return {"title": "By class: the ten worst, the ten best", "head": head, "shown": ends, "folded": rows}


def _confusion(names: Sequence[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the confusion as a matrix, or of many classes the most frequent mistakes."""
    counts: list[list[int]] = measured["confusion"]
    if len(counts) <= _MATRIX:
        return {"confusion": {"names": names, "counts": counts}, "mistakes": None}
    mistakes = sorted(
        ((n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j),
        reverse=True,
    )[:15]
    rows = [(names[i], names[j], f"{n:,} of {sum(counts[i]):,}") for n, i, j in mistakes]
    return {"mistakes": rows}


def _calibration(files: RunFiles, looks: HeldOutLooks | None) -> dict[str, Any] | None:
    """Returns accuracy against confidence, of all predictions if they were written, else of the looks."""
    if files.heads is not None:
        return None
    if files.predictions:
        predictions = [
            (max(row["probabilities"].values()), row["label"] == row["predicted"])
            for row in files.predictions
        ]
        of = f"all {len(predictions):,} pictures of the test split"
    elif looks is not None and looks.split != "train":
        predictions = [(look.confidence or 0.0, look.is_right) for look in looks.seen]
        of = f"{len(predictions):,} of {looks.of:,} pictures of the {looks.split} split"
    else:
        return None
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in predictions:
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, right))
    points: list[tuple[float, float]] = []
    tips: list[str] = []
    sizes: list[float] = []
    most = max((len(inside) for inside in bins.values()), default=1)
    for _, inside in sorted(bins.items()):
        confidence = sum(c for c, _ in inside) / len(inside)
        accuracy = sum(right for _, right in inside) / len(inside)
        points.append((confidence, accuracy))
        sizes.append(len(inside) / most)
        low, high = wilson(accuracy, len(inside))
        tips.append(
            f"{len(inside)} pictures: confidence {confidence:.2f}, accuracy {accuracy:.2f} "
            f"({low:.2f} to {high:.2f})"
        )
    drawn = chart(
        "Calibration", [Series("", points, "dots", "a", tips, sizes)], Axis("confidence", 0, 1),
        Axis("accuracy", 0, 1), diagonal=True,
    )  # fmt: skip
    return {"chart": drawn, "of": of, "bins": BINS}

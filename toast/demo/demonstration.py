"""`toast demo`: both stages on what is embedded, beside a linear probe and LoRA, by the training program."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import toast
from toast.data.vision import transforms
from toast.data.vision.demo_task import DemoSource
from toast.demo.runs import PRETUNE, Size, runs
from toast.embedded.composing import SIDE
from toast.files.atomic import beside, strict_json, try_folder
from toast.report.opening import open_model
from toast.report.samples import of_split, open_split
from toast.report.showing import show_together
from toast.training.interrupts import Interrupted
from toast.training.run import run as train
from toast.training.run_config import RunConfig
from toast.visual.figure import require_matplotlib
from toast.visual.measures import share_of_area
from toast.visual.targets import RATIO

#: Columns of the table: heading, the figures of `result.json` in it, and how they are written.
COLUMNS = (
    ("accuracy", ("accuracy",), "{:.3f}"),
    ("attention\non target", ("attention_on_target",), "{:.3f}"),
    ("selected\nin / out", ("selection_inside", "selection_outside"), "{:.3f} / {:.3f}"),
    ("trained", ("trainable_parameters",), "{:,}"),
    ("s per\nstep", ("median_step_seconds",), "{:.3f}"),
    ("s in\ntotal", ("seconds",), "{:.0f}"),
)
#: The run whose model is drawn, and how many of its pictures.
DRAWN, PICTURES = "toast", 6


def run(out: Path, size: Size | None = None, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Runs the demonstration; what an earlier call in the same folder has done is not done again.

    Args:
        out: Folder for the runs' folders, `attention.png` and `result.json`.
        size: How much of it; None is all.
        seed: Of the pictures, the initial parameters and the order of the data.
        console: Where the table is printed; None is the standard output.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: If the folder holds runs of other options.
        Interrupted: If a signal came; the same call goes on.
    """
    size, console = size or Size(), console or Console()
    require_matplotlib("demo")
    try_folder(out, "out")
    pretune, rows = runs(out, size, seed)
    console.print(
        f"Fashion-MNIST items among clip-art: {size.train} pictures to train on, {size.test} held out. "
        f"The backbone (ViT, 5.5 M parameters) stays frozen. Results go to {out}/."
    )
    stage_one = _ended(pretune, "pretune")
    results = {name: _ended(row.config, "tune") for name, row in rows.items()}
    shutil.rmtree(out / "first-pass", ignore_errors=True)  # the runs that read it have ended
    source = open_split(rows[DRAWN].config, "test")
    assert isinstance(source, DemoSource)
    result = {
        "methods": {name: {"title": rows[name].title, **_figures(ended)} for name, ended in results.items()},
        "box_share_of_area": round(float(share_of_area(source.pictures.boxes, (SIDE, SIDE)).mean()), 4),
        "pre_tuning_seconds": stage_one["seconds"],
        "seconds": round(stage_one["seconds"] + sum(ended["seconds"] for ended in results.values()), 1),
        "seed": seed,
        "size": vars(size),
        "versions": {
            "toast": toast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with beside(out / "result.json") as new:
        new.write_text(strict_json(result, indent=2) + "\n")
    _draw(out, source)
    console.print(as_table(result))
    console.print(_notes(out, result))
    return result


def _ended(config: RunConfig, stage: Any) -> dict[str, Any]:
    try:
        return train(config, stage, resume=True, quiet=True)
    except Interrupted as stopped:
        raise Interrupted(
            stopped.signal_number, f"interrupted in {config.folder}/; the same command continues from there."
        ) from stopped


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a row's figures; what its method has not is not there."""
    found = result["test"] | result
    names = [name for _, figures, _ in COLUMNS for name in figures] + [RATIO]
    return {name: found[name] for name in names if found.get(name) is not None}


def _draw(out: Path, source: DemoSource) -> None:
    opened = open_model(out / DRAWN)
    transform = transforms(opened.backbone.data, train=False)
    samples = of_split(source.subset(range(PICTURES)), transform, None, lambda _: None)
    title = "Where the model looks before and after steering: the first held-out pictures"
    show_together(opened, samples, out / "attention.png", title, smooth=True)


def as_table(result: dict[str, Any]) -> Table:
    """Returns the table of the methods; a dash stands for what a method does not have."""
    table = Table(
        title=f"{result['size']['test']} held-out pictures", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    table.add_column("", no_wrap=True)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["methods"].values():
        cells = [
            form.format(*(row[name] for name in names)) if row.keys() >= set(names) else "–"
            for _, names, form in COLUMNS
        ]
        table.add_row(row["title"], *cells)
    return table


def _notes(out: Path, result: dict[str, Any]) -> str:
    """Returns the lines below the table."""
    return (
        f"The item's box covers {result['box_share_of_area']:.3f} of the picture; selected is the mean "
        "selection weight inside it and outside. The top half uses a stored first pass. The time of a step "
        "is the median, with data loading. Stage one, from which the three rows of TOAST start, took "
        f"{result['pre_tuning_seconds']:.0f} s; all runs took {result['seconds']:.0f} s.\n"
        f"Picture: {out / 'attention.png'}   figures: {out / 'result.json'}\n"
        f"Runs: {', '.join(str(out / name) for name in (PRETUNE, *result['methods']))}\n"
        f"More: toast report {out / DRAWN}, toast compare {out / 'lora'} {out / DRAWN}, "
        f"toast visualize {out / DRAWN}"
    )

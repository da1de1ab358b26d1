"""Draws the README's picture: where a finished run's model looks before and after it is steered.

    python scripts/gallery.py RUN --out docs/gallery.png

RUN is the folder of a run over pictures with boxes, such as those of the embedded task. Of each of the first
classes, the first held-out picture is drawn: none is picked by how it looks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from torch import Tensor

from toast.commands.errors import run_script
from toast.files.atomic import beside
from toast.report.held_out import look_at_split
from toast.report.images import drawn as drawn_panel
from toast.training.data import vision_sources, vision_splits
from toast.training.loaded import load_run
from toast.visual.looks import Look
from toast.visual.panels import FEW, row_of
from toast.visual.pixels import Preparation

# In inches: the README shows 9 of them as about 900 pixels.
WIDTH, LABELS, GAP, LINE, TOP = 9.0, 0.72, 0.05, 0.15, 0.2
#: Pixels of an inch, more than are shown, for fine screens.
DPI = 160
ROWS = ("input", "frozen\nattention", "selection\nweights", "refocused\nattention")
RIGHT, WRONG, QUIET = "#1a7f37", "#be2028", "#57606a"


def chosen(looks: list[Look], count: int) -> list[Look]:
    """Returns the first picture of each of the first classes."""
    first: dict[int, Look] = {}
    for look in sorted(looks, key=lambda look: look.index):
        if look.label is not None:
            first.setdefault(look.label, look)
    return [first[label] for label in sorted(first)][:count]


def draw(looks: list[Look], pictures: list[Tensor], classes: tuple[str, ...], out: Path) -> None:
    """Draws a column for each picture."""
    side = (WIDTH - LABELS) / len(looks) - GAP
    step = side + LINE + 0.03
    height = TOP + len(ROWS) * step
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")

    def write(
        x: float, y: float, text: str, size: float, colour: str, anchor: str, at: str = "baseline"
    ) -> None:
        figure.text(
            x / WIDTH, y / height, text, fontsize=size, color=colour, ha=anchor, va=at,
            linespacing=1.1, parse_math=False,
        )  # fmt: skip

    for number, name in enumerate(ROWS):
        write(LABELS - 0.08, height - TOP - number * step - side / 2, name, 7.5, "black", "right", "center")
    for column, (look, picture) in enumerate(zip(looks, pictures, strict=True)):
        assert look.predicted is not None
        left = LABELS + column * (side + GAP)
        row = row_of(look, picture, kinds=FEW, colour_bars=False)
        images = [drawn_panel(row, panel, round(side * DPI)) for panel in row.panels]
        verdict = f"{classes[look.predicted]} {'✓' if look.is_right else '✗'}"
        texts = [verdict, *(panel.note for panel in row.panels[1:])]
        texts[2] = texts[2].replace(" in the box,", " in,")  # a column is narrow
        notes = zip(texts, (RIGHT if look.is_right else WRONG, QUIET, QUIET, "black"), strict=True)
        assert look.label is not None
        write(left + side / 2, height - TOP + 0.06, classes[look.label], 7.5, "black", "center")
        for number, (image, (note, ink)) in enumerate(zip(images, notes, strict=True)):
            bottom = height - TOP - number * step - side
            axes = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, side / height))
            axes.imshow(image, interpolation="none")
            axes.set_axis_off()
            write(left + side / 2, bottom - 0.11, note, 6.5, ink, "center")
    with beside(out) as new:
        figure.savefig(new, format="png", dpi=DPI)


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of TOAST.")],
    out: Annotated[Path, typer.Option(help="Where the picture is written.")] = Path("docs/gallery.png"),
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 8,
) -> None:
    """Draw where a run's model looks at held-out pictures, before and after."""
    loaded = load_run(run)
    if not loaded.config.method.is_toast:
        raise ValueError(f"{run} trained {loaded.config.method.name}; needs toast or toast-lite.")
    splits = vision_splits(loaded.config, vision_sources(loaded.config), loaded.backbone)
    looks = look_at_split(loaded.model, None, splits)
    data = loaded.backbone.data
    preparation = Preparation.of_pixels(data["mean"], data["std"])
    drawn = chosen([look for look in looks.seen if look.on_target is not None], pictures)
    if not drawn:
        raise ValueError(f"{run}: its {looks.split} split does not say where the answer is.")
    inputs = [preparation.shown(getattr(splits, looks.split)[look.index]["pixels"]) for look in drawn]
    draw(drawn, inputs, splits.classes, out)
    print(f"{out}: {len(drawn)} of {looks.of} pictures; {looks.shows}")


if __name__ == "__main__":
    run_script(main)

"""The demonstration's picture: where the model looks before and after it is steered."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import Tensor

from toast.demo.measures import share_in_boxes
from toast.demo.task import CLASSES, Pictures, normalise
from toast.visual import figure
from toast.visual.figure import Panel, Row
from toast.visual.maps import look


def require_matplotlib() -> None:
    """Says how to install matplotlib if it is not there.

    Raises:
        ImportError: If it is not there.
    """
    figure.require_matplotlib("demo")


def draw(model: PeftModel, pictures: Pictures, rows: Tensor, path: Path, title: str) -> Path:
    """Draws some pictures with what the model looked at.

    Columns: the picture, the frozen model's attention, the selection weights, the refocused attention. Both
    attention maps of a row share one scale; the box of the item is drawn in, and its share of the attention
    is written above.

    Args:
        model: A steered model.
        pictures: Where the pictures come from.
        rows: Indices of the pictures to draw, `(n,)`.
        path: A PNG file; written beside and renamed.
        title: Over the picture.

    Returns:
        The file.

    Raises:
        ImportError: If matplotlib is not there, with how to install it.
    """
    require_matplotlib()
    model.eval()
    views = look(model, normalise(pictures.images[rows]))
    assert views.frozen is not None
    assert views.selection is not None
    assert views.scores is not None
    boxes, cell = pictures.boxes[rows], views.attention.cell
    before, after = views.frozen.values, views.attention.values
    shares = [share_in_boxes(maps, boxes) for maps in (before, after)]
    drawn = []
    for i, row in enumerate(rows.tolist()):
        predicted, label = int(views.scores[i].argmax()), int(pictures.labels[row])
        right = predicted == label
        said = CLASSES[predicted] + ("" if right else f" (is: {CLASSES[label]})")
        top = max(float(before[i].max()), float(after[i].max()))
        chosen = views.selection.values[i]
        panels = [
            Panel(said, wrong=not right),
            Panel(f"frozen: {shares[0][i]:.2f} in the box", before[i], cell, 0.0, top, "share of attention"),
            Panel(f"selection, up to {chosen.max():.2f}", chosen, cell, 0.0, 1.0, "weight"),
            Panel(
                f"refocused: {shares[1][i]:.2f} in the box", after[i], cell, 0.0, top, "share of attention"
            ),
        ]
        picture = pictures.images[row].permute(1, 2, 0).float() / 255
        drawn.append(Row(picture, panels, boxes[i].tolist()))
    return figure.draw(drawn, [path], title, smooth=True)[0]

"""The demonstration's picture: where the model looks before and after it is steered."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

import toast
from toast.demo.measures import LastAttention, as_grid, class_attention, share_in_boxes
from toast.demo.task import CLASSES, SIDE, Pictures, normalise


@dataclass(frozen=True)
class Views:
    """Maps over a few pictures, and the labels that the model gave.

    Args:
        frozen: Class-token attention of the last block of the frozen model, `(n, rows, columns)`, sums to 1.
        selection: Selection weights of the patches, `(n, rows, columns)`, 0 to 1.
        refocused: As `frozen`, in the second pass.
        predicted: `(n,)`.
    """

    frozen: Tensor
    selection: Tensor
    refocused: Tensor
    predicted: Tensor


def require_matplotlib() -> None:
    """Says how to install matplotlib if it is not there.

    Raises:
        ImportError: If it is not there.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("drawing needs matplotlib: pip install 'toast-steering[demo]'")


@torch.no_grad()
def look(model: PeftModel, pictures: Pictures, rows: Tensor) -> Views:
    """Runs a steered model over some pictures, with and without steering, and returns what it looked at."""
    model.eval()
    images = normalise(pictures.images[rows]).to(next(model.parameters()).device)
    # The selector may read a block below the last, where the first pass then ends.
    with model.disable_adapter(), LastAttention() as frozen:
        model(images)
    traced = toast.trace(model, images, attention_blocks=[-1])
    (second,) = traced.attention.values()
    weights = traced.selection_weights[:, 1:].float().cpu()
    return Views(
        frozen=class_attention(frozen.attention.float().cpu()),
        selection=as_grid(weights),
        refocused=class_attention(second.float().cpu()),
        predicted=traced.output.argmax(-1).cpu(),
    )


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
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    views = look(model, pictures, rows)
    boxes = pictures.boxes[rows]
    shares = {name: share_in_boxes(getattr(views, name), boxes) for name in ("frozen", "refocused")}
    figure = Figure(figsize=(8.4, 2.05 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    heat = None
    for i, row in enumerate(rows.tolist()):
        image = pictures.images[row].permute(1, 2, 0).numpy()
        top = float(torch.stack([views.frozen[i], views.refocused[i]]).max())
        right = int(views.predicted[i]) == int(pictures.labels[row])
        said = CLASSES[int(views.predicted[i])] + (
            "" if right else f" (is: {CLASSES[int(pictures.labels[row])]})"
        )
        panels = [
            (None, 1.0, said),
            (views.frozen[i], top, f"frozen: {shares['frozen'][i]:.2f} in the box"),
            (views.selection[i], 1.0, f"selection, up to {views.selection[i].max():.2f}"),
            (views.refocused[i], top, f"refocused: {shares['refocused'][i]:.2f} in the box"),
        ]
        for axis, (values, scale, caption) in zip(axes[i], panels, strict=True):
            axis.imshow(image if values is None else image.mean(-1) / 2 + 127, cmap="gray", vmin=0, vmax=255)
            if values is not None:
                smooth = F.interpolate(values[None, None], size=(SIDE, SIDE), mode="bilinear")[0, 0]
                heat = axis.imshow((smooth / scale).numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.72)
            x0, y0, x1, y1 = boxes[i].tolist()
            edge = "white" if values is not None else "red"
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=1.2))
            axis.set_title(caption, fontsize=8, color="black" if right or values is not None else "firebrick")
            axis.set_axis_off()
    if heat is not None:
        bar = figure.colorbar(heat, ax=axes, shrink=0.5, aspect=30)
        bar.set_label("attention: share of the row's maximum; selection: weight", fontsize=8)
    figure.suptitle(title, fontsize=10)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=130, format="png")
    beside.replace(path)
    return path

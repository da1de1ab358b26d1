"""What the demonstration measures: accuracy, and how much attention falls on the object that counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from toast.demo.composing import SIDE
from toast.demo.task import Pictures, normalise
from toast.visual.grids import Grid
from toast.visual.measures import share_in_target, share_of_area
from toast.visual.relevance import of_head
from toast.visual.seeing import LastAttention

__all__ = ["LastAttention", "batches", "box_share_of_area", "class_attention", "evaluate", "share_in_boxes"]

#: Where the backbone's patches lie: after the class token.
GRID = Grid(prefix=1, rows=8, columns=8, cell=(SIDE / 8, SIDE / 8))


def batches(pictures: Pictures, size: int = 100) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields normalised images `(size, 3, 112, 112)`, labels `(size,)` and boxes `(size, 4)` in order."""
    for start in range(0, len(pictures), size):
        rows = slice(start, start + size)
        yield normalise(pictures.images[rows]), pictures.labels[rows], pictures.boxes[rows]


def class_attention(attention: Tensor) -> Tensor:
    """Returns the class token's attention over the patches, mean over heads, each map summing to 1.

    Args:
        attention: `(batch, heads, tokens, tokens)`, the class token first.

    Returns:
        `(batch, rows, columns)` of the square grid of patches.
    """
    over_patches = GRID.lay_out(of_head(attention, "mean")[:, 0]).values
    return over_patches / over_patches.sum((1, 2), keepdim=True)


def share_in_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Returns the share of each map that lies inside its box; a patch counts by the part that the box covers.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1, over a picture of 112 x 112 pixels.
        boxes: `(batch, 4)`, x0, y0, x1, y1 in pixels.

    Returns:
        `(batch,)`, 0 to 1.
    """
    return share_in_target(maps, boxes, GRID.cell)


def box_share_of_area(pictures: Pictures) -> float:
    """Returns the mean share of the picture that its box covers: what even attention would reach."""
    return float(share_of_area(pictures.boxes, (SIDE, SIDE)).mean())


@torch.inference_mode()
def evaluate(model: nn.Module, pictures: Pictures) -> tuple[float, float]:
    """Returns accuracy and mean attention on target, both 0 to 1.

    Args:
        model: A classifier over a timm ViT with a class token.
        pictures: What to evaluate on.
    """
    model.eval()
    device = next(model.parameters()).device
    right, on_target = 0, 0.0
    for images, labels, boxes in batches(pictures):
        with LastAttention() as seen:
            predicted = model(images.to(device)).argmax(-1).cpu()
        right += int((predicted == labels).sum())
        on_target += float(share_in_boxes(class_attention(seen.attention.float().cpu()), boxes).sum())
    return right / len(pictures), on_target / len(pictures)

"""What the demonstration measures: accuracy, and how much attention falls on the object that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from toast.demo.task import SIDE, Pictures, normalise
from toast.tracing import AttentionMode


class LastAttention(AttentionMode):
    """Sees the attention that a model computes last: in one call, that of its last block."""

    def __init__(self) -> None:
        super().__init__(self._replace)

    def _replace(self, attention: Callable[[], Tensor]) -> None:
        self._last = attention

    @property
    def attention(self) -> Tensor:
        """The attention, `(batch, heads, tokens, tokens)`."""
        return self._last()


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
    over_patches = reduce(attention[:, :, 0, 1:], "batch heads patches -> batch patches", "mean")
    return as_grid(over_patches / over_patches.sum(-1, keepdim=True))


def as_grid(patches: Tensor) -> Tensor:
    """Lays values of patches, `(batch, patches)`, out on their square grid, `(batch, rows, columns)`."""
    rows = round(patches.shape[1] ** 0.5)
    grid: Tensor = rearrange(patches, "batch (rows columns) -> batch rows columns", rows=rows)
    return grid


def share_in_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Returns the share of each map that lies inside its box; a patch counts by the part that the box covers.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1, over a picture of 112 x 112 pixels.
        boxes: `(batch, 4)`, x0, y0, x1, y1 in pixels.

    Returns:
        `(batch,)`, 0 to 1.
    """
    patch = SIDE / maps.shape[-1]
    edges = torch.arange(maps.shape[-1]) * patch
    covered = [
        (
            torch.minimum(boxes[:, end, None], edges + patch) - torch.maximum(boxes[:, start, None], edges)
        ).clamp(min=0)
        for start, end in ((1, 3), (0, 2))
    ]
    down, across = covered[0] / patch, covered[1] / patch
    shares: Tensor = einsum(maps, down, across, "batch rows columns, batch rows, batch columns -> batch")
    return shares


def box_share_of_area(pictures: Pictures) -> float:
    """Returns the mean share of the picture that its box covers: what even attention would reach."""
    boxes = pictures.boxes.float()
    return float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean() / SIDE**2)


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

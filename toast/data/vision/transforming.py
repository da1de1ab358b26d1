"""From a picture to the tensor that a backbone expects, through timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from toast.data.vision.augmentation import Augmentation
from toast.data.vision.source import Box


@dataclass(frozen=True)
class Transform:
    """Turns a picture into normalised pixels, and a box into the mask that lies over them.

    Args:
        pixels: Maps a picture in mode RGB to a float tensor `(3, height, width)`.
        geometry: Resizes and crops as in evaluation, and fills what is outside with black.
        moves: Whether `pixels` may put the object elsewhere than `geometry` does.
    """

    pixels: Callable[[Image.Image], Tensor]
    geometry: Callable[[Image.Image], Image.Image]
    moves: bool

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalised pixels of a picture in mode RGB, float32 `(3, height, width)`."""
        return self.pixels(image)

    def mask(self, box: Box, size: tuple[int, int]) -> Tensor:
        """Paints a box and takes it where evaluation takes the picture.

        Args:
            box: x0, y0, x1, y1 in pixels of the picture.
            size: The picture's width and height in pixels.

        Returns:
            `(height, width)` of the input, float32: the share of each pixel that the box covers, 0 to 1,
            as the resampling leaves it.
        """
        from torchvision.transforms import functional

        x0, y0, x1, y1 = box
        painted = np.outer(_covered(y0, y1, size[1]), _covered(x0, x1, size[0]))
        grey = Image.fromarray((painted * 255).round().astype(np.uint8))
        # the geometry of a picture: padding has a fill for each of three channels
        mask: Tensor = functional.to_tensor(self.geometry(grey.convert("RGB")))[0]
        return mask


def _covered(start: float, end: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the share of each of `count` unit cells in a row that lies between two places."""
    cells = np.arange(count, dtype=np.float64)
    return (np.minimum(cells + 1, end) - np.maximum(cells, start)).clip(0, 1)


def transforms(
    data_config: Mapping[str, Any], *, train: bool, augment: Augmentation | None = None
) -> Transform:
    """Builds what prepares the pictures of a split, with `timm.data.create_transform`.

    Args:
        data_config: What the backbone expects, from `timm.data.resolve_data_config`: `input_size`,
            `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        train: Whether the pictures are trained on; others are resized and cropped at the centre.
        augment: How training pictures are changed at random; None is not at all.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, RandomHorizontalFlip

    config = dict(data_config)
    evaluation = create_transform(**config, is_training=False)
    # The last two turn a picture into a tensor and normalise it. Padding is black under a mask.
    geometry = Compose(
        create_transform(**(config | {"mean": (0.0, 0.0, 0.0)}), is_training=False).transforms[:-2]
    )
    augment = augment or Augmentation()
    if not train or augment.is_none:
        return Transform(evaluation, geometry, moves=False)
    crop, colour, final = create_transform(
        **config,
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        re_prob=augment.re_prob,
        separate=True,
    )
    if augment.scale is None:
        # timm's training transform always crops at random: its first part is replaced
        crop = Compose([*evaluation.transforms[:-2], RandomHorizontalFlip(augment.hflip)])
    return Transform(Compose([crop, colour, final]), geometry, moves=augment.moves)

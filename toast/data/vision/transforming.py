"""From a picture to the tensor that a backbone expects, through timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        pixels: Maps a picture in mode RGB to a float tensor `(channels, height, width)`.
        geometry: Resizes and crops as in evaluation, and fills what is outside with black.
        moves: Whether `pixels` may put the object elsewhere than `geometry` does.
    """

    pixels: Callable[[Image.Image], Tensor]
    geometry: Callable[[Image.Image], Image.Image]
    moves: bool

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the normalised pixels of a picture in mode RGB, float32 `(channels, height, width)`."""
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


def _cut_ends(image: Image.Image, longest: int) -> Image.Image:
    """Cuts the ends of a very elongated picture off.

    Resized by its shorter side, it could fill the memory only for its centre to be cropped; resized by its
    longer side, nothing could be left of the shorter.

    Args:
        image: The picture.
        longest: Most that its length may be over its width.
    """
    width, height = image.size
    most = min(width, height) * longest
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


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
            `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`. Where `input_size` has one channel,
            pictures become grey (ITU-R BT.601) after all else that is done to them in colour.
        train: Whether the pictures are trained on; others are resized and cropped at the centre.
        augment: How training pictures are changed at random; None is not at all.

    Raises:
        ValueError: If the model takes neither one channel nor three.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Grayscale, Normalize, RandomHorizontalFlip

    config = dict(data_config)
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels; pictures have 3, red, green and blue, or 1, grey. Set "
            "model.options.in_chans to one of these."
        )
    grey = [Grayscale()] if channels == 1 else []
    if grey:
        config |= {"input_size": (3, *config["input_size"][1:])}
        config |= {name: tuple(config[name]) * 3 for name in ("mean", "std")}

    def steps(**changed: Any) -> tuple[list[Any], list[Any]]:
        """Returns what is done to a picture in evaluation, and what makes a normalised tensor of it."""
        made = create_transform(**(config | changed), is_training=False).transforms
        # the crop of the centre sees far less; the other mode that keeps the ratio needs a pixel to be left
        kept = {"center": 16, "border": min(config["input_size"][1:]) // 2}.get(
            config.get("crop_mode") or "center"
        )
        cut = [] if kept is None else [partial(_cut_ends, longest=max(1, kept))]
        return [*cut, *made[:-2]], made[-2:]

    def final(last: list[Any]) -> list[Any]:
        """Returns what makes a tensor of as many channels as the model takes."""
        one = Normalize(data_config["mean"], data_config["std"])
        return [*grey, *(one if grey and isinstance(each, Normalize) else each for each in last)]

    placed, last = steps()
    geometry = Compose(steps(mean=(0.0, 0.0, 0.0))[0])  # padding is black under a mask
    augment = augment or Augmentation()
    if not train or augment.is_none:
        return Transform(Compose([*placed, *final(last)]), geometry, moves=False)
    crop, colour, ending = create_transform(
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
        crop = Compose([*placed, RandomHorizontalFlip(augment.hflip)])
    pixels = Compose([crop, colour, *final(ending.transforms)])
    return Transform(pixels, geometry, moves=augment.moves)

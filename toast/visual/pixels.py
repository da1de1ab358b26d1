"""From a user's picture to the pixels that a model takes, and back to a picture of what it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toast.visual.seeing import find_parts

Statistics = Sequence[float]


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before a model sees it.

    Args:
        prepare: Makes pixels `(channels, height, width)` of an RGB picture of Pillow.
        mean: Per-channel mean that was subtracted; None if it is not known.
        std: Per-channel standard deviation that was divided by.
    """

    prepare: Callable[[Any], Tensor]
    mean: Statistics | None = None
    std: Statistics | None = None

    @classmethod
    def of_pixels(cls, mean: Statistics | None, std: Statistics | None) -> Preparation:
        """Returns that of what is pixels already, to show them."""
        return cls(lambda pixels: pixels, mean, std)

    def shown(self, pixels: Tensor) -> Tensor:
        """Returns what the model saw as a picture: resized and cropped as it was, without normalisation.

        Where the normalisation is not known, each picture is stretched to full range.

        Args:
            pixels: `(channels, height, width)`.

        Returns:
            `(height, width, 3)`, 0 to 1.
        """
        pixels = pixels.detach().to("cpu", torch.float32)
        if self.mean is not None and self.std is not None:
            pixels = pixels * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        else:
            low, high = pixels.amin(), pixels.amax()
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        if pixels.shape[0] != 3:
            pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
        return pixels.clamp(0, 1).permute(1, 2, 0)


def find_preparation(
    model: nn.Module,
    processor: Any = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
) -> Preparation:
    """Finds what a model's pictures go through.

    Args:
        model: The model.
        processor: An image processor of transformers, or any function from a picture of Pillow to normalised
            pixels `(channels, height, width)`. None is what timm keeps with a model.
        mean: Per-channel mean of a function, to show pictures in their colours.
        std: Per-channel standard deviation of the same.

    Raises:
        ValueError: If it is not known.
    """
    if processor is not None and hasattr(processor, "image_mean"):

        def process(picture: Any) -> Tensor:
            pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
            return pixels

        normalises = getattr(processor, "do_normalize", True)
        statistics = (processor.image_mean, processor.image_std) if normalises else ([0.0] * 3, [1.0] * 3)
        return Preparation(process, mean or statistics[0], std or statistics[1])
    if processor is not None:
        return Preparation(processor, mean, std)
    trunk = find_parts(model).trunk
    if not getattr(trunk, "pretrained_cfg", None):
        raise ValueError(
            f"{type(trunk).__name__} does not say how its pictures are prepared. Pass processor=: an image "
            "processor of transformers (AutoImageProcessor.from_pretrained(...)), or a function from a "
            "picture of Pillow to normalised pixels (channels, height, width), with mean= and std=."
        )
    from timm.data import resolve_model_data_config

    from toast.data.vision.channels import channels_of, with_channels
    from toast.data.vision.transforming import transforms

    settings = resolve_model_data_config(trunk)
    embedding = getattr(trunk, "patch_embed", None)
    if getattr(embedding, "img_size", None) is not None and not getattr(trunk, "dynamic_img_size", False):
        settings["input_size"] = (3, *embedding.img_size)  # type: ignore[union-attr]
    settings = with_channels(settings, channels_of(trunk))
    transform = transforms(settings, train=False)
    return Preparation(transform, mean or settings["mean"], std or settings["std"])


def open_picture(image: Any) -> Any:
    """Returns an RGB picture of Pillow, turned as its camera says.

    Args:
        image: A path, or a picture of Pillow.

    Raises:
        ImportError: If Pillow is not there.
        ValueError: If it is no picture.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'toast-steering[visual]'") from error
    from toast.data.vision.decoding import DECODING_ERRORS, decode, reason, to_rgb

    if isinstance(image, str | Path):
        if not Path(image).exists():
            raise ValueError(f"images: there is no file {str(image)!r}.")
        return decode(Path(image), f"images: {str(image)!r} is not a picture that Pillow can read")
    if not isinstance(image, Image.Image):
        raise ValueError(  # noqa: TRY004 - one of several values of an argument
            f"images: needs paths, pictures of Pillow or pixels (channels, height, width); got {type(image)}."
        )
    try:
        return to_rgb(image).image
    except DECODING_ERRORS as error:
        raise ValueError(f"images: a picture of Pillow cannot be read: {reason(error)}") from error

"""Pictures made worse at test time, after ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261).

Noise, blur and contrast with the constants of that benchmark, on the picture that the backbone sees, before
its normalisation. Lengths are scaled from the benchmark's 224 pixels to the picture's shorter side. Results
are not rounded to 8 bits. Contrast is written out: torchvision's pulls to the mean of the grey picture, the
benchmark to that of each channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from toast.data.vision.dataset import VisionDataset, seeded

#: Side of ImageNet-C's pictures in pixels.
REFERENCE: Final = 224
#: How many deviations of a Gaussian the blur's kernel reaches on either side, as in scikit-image.
_REACH: Final = 4


def _noise(x: Tensor, deviation: float) -> Tensor:
    return x + deviation * torch.randn_like(x)


def _blur(x: Tensor, deviation: float) -> Tensor:
    scaled = deviation * min(x.shape[-2:]) / REFERENCE
    kernel = 2 * max(1, math.ceil(_REACH * scaled)) + 1
    blurred: Tensor = functional.gaussian_blur(x, [kernel, kernel], [scaled, scaled])
    return blurred


def _contrast(x: Tensor, factor: float) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    return mean + factor * (x - mean)


@dataclass(frozen=True)
class Corruption:
    """One way of making a picture worse.

    Args:
        apply: Maps a picture `(3, height, width)`, 0 to 1, and a strength to the corrupted one.
        strengths: By severity, 1 to 5.
    """

    apply: Callable[[Tensor, float], Tensor]
    strengths: tuple[float, float, float, float, float]


#: By name: deviation of the noise, deviation of the blur in pixels of 224, factor of the contrast.
CORRUPTIONS: Final[dict[str, Corruption]] = {
    "noise": Corruption(_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": Corruption(_blur, (1, 2, 3, 4, 6)),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
}


def strength(name: str, severity: int) -> float:
    """Returns how strong a corruption is at a severity.

    Raises:
        ValueError: If there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: needs one of {', '.join(CORRUPTIONS)}; got {name!r}.")
    strengths = CORRUPTIONS[name].strengths
    if severity not in range(1, len(strengths) + 1):
        raise ValueError(f"severity of {name}: needs 1 to {len(strengths)}; got {severity!r}.")
    return strengths[severity - 1]


def corrupt(picture: Tensor, name: str, severity: int) -> Tensor:
    """Makes a picture worse; noise is drawn from PyTorch's generator.

    Args:
        picture: `(3, height, width)`, 0 to 1.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.

    Returns:
        The corrupted picture, cut off at 0 and 1.

    Raises:
        ValueError: If there is no such corruption or severity.
    """
    strong = strength(name, severity)
    return CORRUPTIONS[name].apply(picture, strong).clamp(0, 1)


class Corrupted(Dataset[dict[str, Any]]):
    """The pictures of a data set, made worse. What is drawn depends on seed and index alone.

    Args:
        plain: The data set.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        mean: By which the pixels were normalised, by channel.
        std: The same of the deviation.

    Raises:
        ValueError: As `corrupt`.
    """

    def __init__(
        self, plain: VisionDataset, name: str, severity: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        strength(name, severity)  # refuses what is not there before the first picture
        self.plain, self.name, self.severity = plain, name, severity
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Prepares one picture, as `VisionDataset` does."""
        item = self.plain[key]
        if "bad" in item:
            return item
        with seeded(self.plain.seed, item["index"]):
            worse = corrupt(item["pixels"] * self.std + self.mean, self.name, self.severity)
        return item | {"pixels": (worse - self.mean) / self.std}

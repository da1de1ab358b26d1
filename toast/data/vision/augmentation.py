"""What is changed at random in a training picture, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are changed at random; without arguments, not at all.

    The names and meanings of the fields are those of `timm.data.create_transform`.

    Args:
        scale: Smallest and largest share of the picture's area that a random crop keeps, which is then
            resized to the input's size; None resizes and crops the centre, as in evaluation.
        hflip: Probability of a mirror image.
        color_jitter: Largest relative change of brightness, contrast and saturation; 0 is none. timm leaves
            it out where `auto_augment` is given, unless that contains "3a".
        auto_augment: A policy in timm's words, such as "rand-m9-mstd0.5-inc1"; None is none.
        re_prob: Probability that a rectangle is erased.

    Raises:
        ValueError: If a field is out of its range.
    """

    scale: tuple[float, float] | None = None
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.scale is not None:
            # a configuration file has lists
            object.__setattr__(self, "scale", tuple(self.scale))
            if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
                raise ValueError(f"scale: two shares 0 < smallest <= largest <= 1; got {self.scale}.")
        for name in ("hflip", "re_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: a probability, 0 to 1; got {getattr(self, name)}.")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter: 0 or more; got {self.color_jitter}.")

    @classmethod
    def preset(cls, name: str) -> Augmentation:
        """Returns the settings of a name in `PRESETS`.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"augmentation: the presets are {', '.join(PRESETS)}; got {name!r}.")
        return PRESETS[name]

    @property
    def is_none(self) -> bool:
        """Whether nothing is random: every epoch then sees the same pixels, so they may be stored."""
        return self == Augmentation()

    @property
    def moves(self) -> bool:
        """Whether a pixel may end elsewhere than the evaluation transform puts it."""
        return self.scale is not None or self.hflip > 0 or self.auto_augment is not None


PRESETS: Final = {
    "none": Augmentation(),
    "flip": Augmentation(hflip=0.5),
    "crop-flip": Augmentation(scale=(0.08, 1.0), hflip=0.5),
    "randaugment": Augmentation(
        scale=(0.08, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
    ),
}
"""Settings by name. The ranges are timm's for ImageNet."""

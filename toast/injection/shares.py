"""Blocks that a configuration names by their share of the depth, such as 0.75."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from toast.config import ToastConfig

PLACES = ("select_from", "steer_from")


def block_of(place: Any, blocks: int) -> Any:
    """Returns the block of a share of the depth, rounded down; whole numbers as int, others as they are."""
    if isinstance(place, Integral):
        return int(place)
    if not isinstance(place, float) or not 0 <= place < 1:
        return place
    # 0.7 of 10 blocks is block 7, whichever way the product is rounded.
    return min(math.floor(place * blocks + 1e-9), blocks - 1)


def place_shares(config: ToastConfig, blocks: int) -> None:
    """Puts blocks in the place of a configuration's shares."""
    for name in PLACES:
        setattr(config, name, block_of(getattr(config, name), blocks))


def placed(settings: dict[str, Any], blocks: int) -> dict[str, Any]:
    """Returns saved settings with blocks in the place of shares: some are written before there is a model."""
    return {name: block_of(value, blocks) if name in PLACES else value for name, value in settings.items()}

"""How many channels a model takes of a picture, and what that makes of how its pictures are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from toast.families.anatomy import unwrapped


def channels_of(model: nn.Module) -> int:
    """Returns how many channels a model of timm takes: those of the layer that it calls its first."""
    first = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    for name in [first] if isinstance(first, str) else first:
        try:
            return int(unwrapped(model.get_submodule(name)).in_channels)  # type: ignore[arg-type]
        except AttributeError:
            continue
    return 3


def with_channels(data_config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Returns a data configuration of timm for as many channels as the model takes.

    A model of one channel takes grey pictures, as in timm's own training; they are normalised with the mean
    over the channels of what the colours are normalised with.

    Args:
        data_config: `input_size`, `mean`, `std` and what else there is.
        channels: Channels that the model takes.
    """
    config = dict(data_config)
    size, mean, std = config["input_size"], config["mean"], config["std"]
    config["input_size"] = (channels, *size[1:])
    if channels == 1:
        config |= {"mean": (sum(mean) / len(mean),), "std": (sum(std) / len(std),)}
    return config

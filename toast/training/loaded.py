"""A finished run as a model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from toast.training import folder
from toast.training.backbones import Backbone
from toast.training.config import RunConfig
from toast.training.loading import load_config
from toast.training.methods import load_method
from toast.training.preparing import open_seeded


@dataclass(frozen=True)
class LoadedRun:
    """What a run has trained, ready to be used.

    Args:
        model: The model, in evaluation mode.
        backbone: How it is fed; for language, its tokenizer.
        config: The run's configuration.
        classes: Vision: names of the labels.
    """

    model: nn.Module
    backbone: Backbone
    config: RunConfig
    classes: tuple[str, ...]


def load_run(place: str | Path) -> LoadedRun:
    """Opens the backbone of a run and puts in what was trained.

    Args:
        place: The run's folder.

    Raises:
        ValueError: If it is no run's folder, or the run has not ended.
    """
    place = Path(place)
    if not (place / folder.CONFIG).is_file():
        raise ValueError(f"{place} is no run: it has no {folder.CONFIG}.")
    if not (place / folder.ADAPTER).is_dir():
        raise ValueError(f"{place} has not ended: it has no {folder.ADAPTER}/. Go on with it by --resume.")
    config = load_config(place)
    classes = tuple(folder.read_json(place / folder.LABELS))
    backbone = open_seeded(config, len(classes) or None)
    return LoadedRun(load_method(backbone, config, place / folder.ADAPTER), backbone, config, classes)

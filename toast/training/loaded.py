"""A finished run as a model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from toast.training import run_folder
from toast.training.backbones import Backbone
from toast.training.config_files import load_config
from toast.training.methods import load_method
from toast.training.preparing import open_seeded
from toast.training.run_config import RunConfig


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
    if not (place / run_folder.CONFIG).is_file():
        raise ValueError(f"{place} is not a run: it has no {run_folder.CONFIG}.")
    if not (place / run_folder.ADAPTER).is_dir():
        raise ValueError(
            f"{place} is not finished: it has no {run_folder.ADAPTER}/. Continue it with --resume."
        )
    config = load_config(place)
    classes = tuple(run_folder.read_json(place / run_folder.LABELS))
    backbone = open_seeded(config, len(classes) or None)
    return LoadedRun(load_method(backbone, config, place / run_folder.ADAPTER), backbone, config, classes)

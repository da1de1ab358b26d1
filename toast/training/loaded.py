"""A finished run as a model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from toast.training import run_folder
from toast.training.answer_kinds import Answers
from toast.training.backbones import Backbone
from toast.training.config_files import load_config
from toast.training.many_heads import answers_of
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
        classes: Vision: names of the labels; empty where heads are configured.
        answers: What its outputs are held against.
    """

    model: nn.Module
    backbone: Backbone
    config: RunConfig
    classes: tuple[str, ...]
    answers: Answers


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
    record = run_folder.read_labels(place / run_folder.LABELS, bool(config.heads))
    answers = answers_of(config, record)
    backbone = open_seeded(config, answers.outputs)
    model = load_method(backbone, config, place / run_folder.ADAPTER)
    return LoadedRun(model, backbone, config, () if config.heads else tuple(record), answers)

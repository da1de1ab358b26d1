"""Small studies, and runs that cost nothing: figures are a function of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.training.settings import vision
from toast.training import run_folder
from toast.training.config_files import to_yaml
from toast.training.run_config import RunConfig

#: Right answers, of how many pictures.
PICTURES = 20


def study(tmp: Path, study: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """Returns a study of two rows and two seeds on the test pictures."""
    (tmp / "generic.yaml").write_text(to_yaml(vision(tmp, name="generic", epochs=1)))
    section = {
        "rows": {
            "linear": {"method": "linear"},
            "toast": {
                "method": {"name": "toast", "start": "pretune/top", "options": {"steer_from": 1}},
                "grid": {"optimizer.learning_rate": [1e-2]},
            },
        },
        "grid": {"optimizer.learning_rate": [1e-3, 1e-2]},
        "pretune": {"top": {"config": str(tmp / "generic.yaml"), "method.options.steer_from": 1}},
        "seeds": 2,
    }  # fmt: skip
    given = {"name": "small", "sweep": section, "study": study or {}, "data.validation_share": 0.25}
    return vision(tmp, **given, **settings)


class Runs:
    """Stands in for the training program: writes what it writes, at once, and remembers what it was asked.

    Args:
        stop: Number of the call that fails.
        error: How it fails.
    """

    def __init__(self, stop: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[RunConfig] = []
        self.stop, self.error = stop, error

    @property
    def names(self) -> list[str]:
        """Last parts of the folders of what was run."""
        return ["/".join(each.folder.parts[-4:]) for each in self.asked]

    def __call__(self, config: RunConfig, stage: str, resume: bool = False) -> dict[str, Any]:
        """Runs it, unless it is done."""
        place = config.folder
        if resume and (place / run_folder.RESULT).is_file():
            return dict(run_folder.read_json(place / run_folder.RESULT))
        if self.stop == len(self.asked) and self.error is not None:
            self.stop = None
            raise self.error
        self.asked.append(config)
        place.mkdir(parents=True)
        (place / run_folder.CHECKPOINTS).mkdir()
        (place / run_folder.ADAPTER).mkdir()
        right = 5 + round(1000 * config.optimizer.learning_rate) // 2 + config.seed
        if config.data.test is not None:
            write_predictions(place / run_folder.PREDICTIONS, np.arange(PICTURES) < right)
        measured = {"accuracy": right / PICTURES, "loss": 1.0, "samples": PICTURES}
        result = {
            "name": config.name, "stage": stage, "task": config.task, "method": config.method.name,
            "trained": {"head": 123}, "parameters": 1234, "bad_samples": {},
            "validation": measured if config.data.validation_share else None,
            "test": measured if config.data.test else None,
            "steps": 10, "step_seconds": 5.0, "median_step_seconds": 0.4, "seconds": 6.0,
            "trainable_parameters": 123, "samples": {"images": {"train": 24}},
        }  # fmt: skip
        run_folder.write_json(place / run_folder.RESULT, result)
        return result


def write_predictions(path: Path, correct: Any, attention: Any = None) -> None:
    """Writes predictions as a run does."""
    shares = np.linspace(0, 1, len(correct)) if attention is None else attention
    rows = [
        {
            "index": index,
            "label": "a",
            "predicted": "a" if right else "b",
            "attention_on_target": float(share),
        }
        for index, (right, share) in enumerate(zip(correct, shares, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

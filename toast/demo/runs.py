"""The demonstration's runs as configurations of the training program, read from `runs.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from toast.training.config_files import make_config, read_yaml
from toast.training.run_config import RunConfig
from toast.training.run_folder import ADAPTER

#: The run of stage one, which rows name as `method.start`.
PRETUNE = "pretune"


@dataclass(frozen=True)
class Size:
    """How much of the demonstration is run.

    Args:
        train: Pictures to train on, at most 3,000.
        test: Held-out pictures, at most 1,000.
        generic: Pictures of stage one.
        share: Share of the epochs of every run.
    """

    train: int = 1000
    test: int = 500
    generic: int = 1000
    share: float = 1.0


@dataclass(frozen=True)
class DemoRow:
    """A row of the table.

    Args:
        title: Its name there.
        config: Its run.
    """

    title: str
    config: RunConfig


def runs(out: Path, size: Size, seed: int) -> tuple[RunConfig, dict[str, DemoRow]]:
    """Returns the run of stage one, and those of the table by the name of their folder.

    Args:
        out: Folder of the runs' folders.
        size: How much of them.
        seed: Of pictures, parameters and order.
    """
    held = read_yaml(Path(str(resources.files("toast.demo"))) / "runs.yaml")
    counts = {"train": size.train, "val": 0, "test": size.test, "generic": size.generic, "seed": seed}
    task = {"source": "demo", "train": "train", "test": "test", "options": counts}
    generic = {"source": "demo", "train": "generic", "options": counts}

    def made(name: str, settings: dict[str, Any], data: dict[str, Any]) -> RunConfig:
        own = {"name": name, "out": str(out), "seed": seed, "data": data}
        own["epochs"] = max(1, round(settings["epochs"] * size.share))
        config = make_config(held["shared"], (settings | own).items(), f"runs.yaml, {name}")
        if config.method.start == Path(PRETUNE):
            method = config.method.model_copy(update={"start": out.absolute() / PRETUNE / ADAPTER})
            return config.model_copy(update={"method": method})
        return config

    rows = {}
    for name, settings in held["rows"].items():
        title = settings.pop("title")
        rows[name] = DemoRow(title, made(name, settings, task))
    return made(PRETUNE, held["pretune"], generic), rows

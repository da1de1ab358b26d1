"""The folder of a run: what is in it, and how it is written so that nothing is ever half there.

config.yaml        the resolved configuration
environment.json   versions, devices, and the command
metrics.jsonl      a JSON object a line: losses, rates, measurements
checkpoints/       what a run resumes from
adapter/           what was trained, in PEFT's format where PEFT has it
predictions.jsonl  the test samples' predictions, if wanted
labels.json        names of the classes; by head, what was learnt of the training targets
result.json        what came out; there when the run has ended
.lock              held by the process that writes here, which .writer.json names (`toast.training.locking`)
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from toast.files import json_files
from toast.files.atomic import beside, finite, strict_json
from toast.files.json_files import NUMBER, OTHERS, Kinds, read_json_lines, read_json_list
from toast.version import __version__

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
PREDICTIONS = "predictions.jsonl"
RESULT = "result.json"
LABELS = "labels.json"
#: Of an adapter in PEFT's format.
ADAPTER_CONFIG = "adapter_config.json"
SWEEP = "sweep.json"


def refuse_no_run(place: Path) -> None:
    """Checks that a folder is that of a run.

    Raises:
        ValueError: If it is not; of a sweep it says where its runs are.
    """
    if (place / CONFIG).is_file():
        return
    if (place / SWEEP).is_file() or (place / "final").is_dir():
        runs = place / "final" / "ROW" / "POINT,seed-0"
        raise ValueError(f"{place} is a sweep; needs one of its runs, such as {runs}.")
    raise ValueError(f"{place} is not a run: it has no {CONFIG}.")


def holds_run(place: Path) -> bool:
    """Whether a folder is that of a run, and not of an adapter.

    Raises:
        ValueError: If it is neither.
    """
    if (place / CONFIG).is_file():
        return True
    if (place / ADAPTER_CONFIG).is_file():
        return False
    raise ValueError(
        f"{place} is neither a run's folder, with {CONFIG}, nor an adapter's, with {ADAPTER_CONFIG}."
    )


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with beside(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, held: Any) -> None:
    """Writes a JSON file, whole or not at all; numbers that are not finite are null."""
    write_text(path, strict_json(held, indent=2, default=str) + "\n")


#: What the files of a run and of a sweep hold, by key.
_KEYS: dict[str, dict[str, Kinds]] = {
    RESULT: {
        "name": str, "stage": str, "task": str, "method": str, "trained": dict, "trainable_parameters": int,
        "parameters": int, "steps": int, "samples": dict, "validation": (dict, type(None)),
        "test": (dict, type(None)), "bad_samples": dict, "step_seconds": NUMBER, "seconds": NUMBER,
    },
    SWEEP: {"name": str, "seeds": int, "rows": dict},
    METRICS: {"step": int, "epoch": NUMBER, "split": str, OTHERS: (int, float, type(None))},
    PREDICTIONS: {"index": int, "label": (str, dict), "predicted": (str, dict), "probabilities": dict},
}  # fmt: skip


def read_json(path: Path) -> Any:
    """Reads one of the JSON files above.

    Raises:
        ValueError: If it is not there or damaged: names the file, the line and what is wrong.
    """
    return json_files.read_json(path, _KEYS.get(path.name))


def read_labels(path: Path, heads: bool) -> Any:
    """Reads the names of the classes, a list; of a run with heads, what was recorded of each.

    Raises:
        ValueError: If it is not there or damaged.
    """
    return json_files.read_json(path) if heads else read_json_list(path, str)


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Reads the predictions of a run; none if they were not wanted.

    Raises:
        ValueError: If they are damaged.
    """
    path = folder / PREDICTIONS
    return read_json_lines(path, _KEYS[PREDICTIONS]) if path.exists() else []


def begin(folder: Path, step: int, config: str, labels: Any) -> None:
    """Writes what a run is, before its first step or the first that it makes again.

    Args:
        folder: The run's folder.
        step: Steps that were made; measurements after them are taken back.
        config: The resolved configuration, as YAML.
        labels: What `labels.json` holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / METRICS).is_file():
        cut_metrics(folder, step)
    write_text(folder / CONFIG, config)
    write_json(folder / ENVIRONMENT, environment())
    write_json(folder / LABELS, labels)


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Adds a line of measurements; a line is written in one piece."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(strict_json(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads all measurements of a run, without those that are no finite numbers.

    A last line that an interruption cut off is left out.

    Raises:
        ValueError: If another line is damaged.
    """
    path = folder / METRICS
    rows = read_json_lines(path, _KEYS[METRICS], may_be_cut=True) if path.exists() else []
    return [{name: value for name, value in finite(row).items() if value is not None} for row in rows]


def cut_metrics(folder: Path, step: int) -> None:
    """Takes back the measurements after a step, which a resumed run makes again."""
    kept = [strict_json(row) + "\n" for row in read_metrics(folder) if row["step"] <= step]
    write_text(folder / METRICS, "".join(kept))


def environment() -> dict[str, Any]:
    """Returns what a run's figures depend on beside its configuration."""
    import accelerate
    import peft
    import timm
    import torch
    import transformers

    libraries = (torch, transformers, peft, timm, accelerate)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": gpus,
        "versions": {"toast": __version__} | {library.__name__: library.__version__ for library in libraries},
    }

"""The commands `toast pretune` and `toast tune`: stage one and stage two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toast.commands.configuration import Config, DryRun, Overrides, Resume
from toast.commands.processes import say

if TYPE_CHECKING:
    from toast.training.preparing import Stage


def pretune(
    config: Config, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False
) -> None:
    """Train the top-down module on generic data, with the reconstruction loss (stage one)."""
    _train("pretune", config, overrides, dry_run, resume)


def tune(
    config: Config, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False
) -> None:
    """Train on a task (stage two), by TOAST or a baseline."""
    _train("tune", config, overrides, dry_run, resume)


def _train(stage: Stage, config: Path, overrides: list[str] | None, dry_run: bool, resume: bool) -> None:
    from toast.training.config_files import load_config

    loaded = load_config(config, overrides or ())
    loaded.check_stage(stage)
    from toast.training.dry_run import dry_run as show
    from toast.training.run import run

    if dry_run:
        show(loaded, stage)
        return
    result = run(loaded, stage, resume)
    say(summary(result, loaded.folder))


def summary(result: dict[str, Any], place: Path) -> str:
    """Returns what a run gave, a line for each split, and where it is."""
    lines = [
        f"before training, {name}: {_figures(found)}" for name, found in result.get("before", {}).items()
    ]
    measured: dict[str, Any] = {name: result[name] for name in ("validation", "test")}
    measured |= result.get("splits", {})
    for name, by_severity in result.get("corrupted", {}).items():
        measured |= {f"test, {name} {severity}": found for severity, found in by_severity.items()}
    for name, found in measured.items():
        if found is not None:
            lines.append(f"{name}: {_figures(found)}")
    lines.append(f"{result['seconds']} s; results are in {place}/ (result.json, adapter/, metrics.jsonl)")
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))

"""Whether a folder's run goes on with some settings: what may change, and what was recorded of the rest."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from toast.training import run_folder
from toast.training.config_files import load_config
from toast.training.run_config import RunConfig

#: Settings, and whole sections, that a run may go on with another value of: why its results stay the same.
MAY_CHANGE: dict[str, str] = {
    "name": "where the run lies",
    "out": "where the run lies",
    "stage": "a limit to one command; the stage itself is recorded and compared",
    "sweep": "what is searched around a run",
    "study": "what is asked of several runs",
    "checkpoint.every": "when it is kept",
    "checkpoint.keep": "how much is kept of it",
    "first_pass": "what is stored is what would be computed",
    "checkpointing": "the same sums, made twice",
    "workers": "a sample is a function of seed, epoch and index",
    "log_every": "when losses are read from the device",
    "trackers": "where figures go",
    "data.bad_share": "when the run stops",
    "on_nonfinite": "whether the run stops, or what it has stopped at is left out",
    "evaluation.every": "measuring draws nothing that training draws from; not where it chooses the best",
    "evaluation.batch_size": "each sample counts once",
    "evaluation.predictions": "what is written beside",
}
#: Of these, what an ended run cannot take up any more: its figures were measured under the recorded ones.
_UNTIL_MEASURED = ("evaluation",)
#: What a folder holds once a run has begun in it.
_TRACES = (run_folder.METRICS, run_folder.RESULT, run_folder.CHECKPOINTS, run_folder.ADAPTER)


def ended_run(config: RunConfig, stage: str, resume: bool) -> dict[str, Any] | None:
    """Checks a run's folder before anything is written into it.

    Args:
        config: The configuration of the run that is to begin or to go on.
        stage: `pretune` or `tune`.
        resume: Whether it is to go on.

    Returns:
        What `result.json` holds if the run has ended, else None.

    Raises:
        ValueError: If the folder holds a run and this one is to begin, or that run has other settings.
    """
    place = config.folder
    if not any((place / name).exists() for name in _TRACES):
        return None
    if not resume:
        raise ValueError(
            f"{place} holds a run already. Continue it with --resume, or choose another name=… or out=…."
        )
    ended = (place / run_folder.RESULT).is_file()
    recorded = load_config(place)
    refuse_others(config, recorded, place, ended)
    if not ended:
        return None
    result = dict(run_folder.read_json(place / run_folder.RESULT))
    refuse_changed({"stage": stage}, {"stage": result.get("stage", stage)}, str(place))
    return result


def refuse_others(config: RunConfig, recorded: RunConfig, place: Path, ended: bool) -> None:
    """Refuses to go on with a run under settings that would have given it other results.

    Args:
        config: The settings that are asked for.
        recorded: Those that the run began with.
        place: The run's folder, for the message.
        ended: Whether the run has been measured, too.

    Raises:
        ValueError: If settings differ; it names each with both values.
    """
    # What is measured between the steps decides which of them is the best.
    kept_best = () if config.checkpoint.best is None else ("evaluation.every",)
    wanted, found = (flat(each.model_dump(mode="json")) for each in (config, recorded))
    compared = {
        name for name in wanted.keys() | found.keys() if name in kept_best or not _may_change(name, ended)
    }
    differ = [name for name in sorted(compared) if wanted.get(name) != found.get(name)]
    if differ:
        changes = "; ".join(f"{name} was {found.get(name)}, now {wanted.get(name)}" for name in differ)
        raise ValueError(
            f"{place} holds a run of other settings: {changes}. Continue with the run's own settings "
            f"({place}/config.yaml), choose another name=… or out=…, or delete that folder."
        )


def refuse_changed(now: dict[str, Any], recorded: dict[str, Any], place: str) -> None:
    """Refuses what a run's settings do not say and its results depend on, if it is not as it was.

    Args:
        now: By name, as it is.
        recorded: By name, as it was; names that are missing were not recorded and are not compared.
        place: Of the record, for the message.

    Raises:
        ValueError: If something has changed.
    """
    differ = [name for name in now if name in recorded and recorded[name] != now[name]]
    if differ:
        changes = "; ".join(f"{name} was {recorded[name]}, now {now[name]}" for name in differ)
        raise ValueError(
            f"{place} is of another run: {changes}. Continue with the original settings, or start another."
        )


def refuse_other_classes(labels: Path, now: Any, heads: bool) -> None:
    """Refuses to go on with data whose classes are others than those recorded, or in another order.

    Args:
        labels: Where they are recorded.
        now: What would be recorded now.
        heads: Whether it is by head.

    Raises:
        ValueError: If they are; it names the first.
    """
    before = run_folder.read_labels(labels, heads) if labels.is_file() else now
    if heads and before != now:
        name = next(name for name in now if before.get(name) != now[name])
        raise ValueError(
            f"{labels} was made from other targets than the data's: heads.{name} was {before.get(name)}, now "
            f"{now[name]}. Continue with the data that the run began with, or start another run."
        )
    if before != now:
        pairs = itertools.zip_longest(before, now)
        was, is_ = next((was, is_) for was, is_ in pairs if was != is_)
        raise ValueError(
            f"{labels} names other classes than the data, first {was!r}, now {is_!r}. Continue with the "
            "data that the run began with, or start another run."
        )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings by dotted name; values that are no plain ones as text, which trackers want."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (int, float, bool, str)) else str(value)
    return found


def _may_change(name: str, ended: bool) -> bool:
    parts = name.split(".")
    if ended and parts[0] in _UNTIL_MEASURED:
        return False
    return any(".".join(parts[:count]) in MAY_CHANGE for count in range(1, len(parts) + 1))

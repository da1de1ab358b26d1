"""The command `toast evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.commands.configuration import Overrides
from toast.commands.processes import say


def evaluate(
    config: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run's folder, or a configuration.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="validation, test, or one of evaluation.splits.")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(help="Write each sample's prediction to this file, as JSON lines.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="Language: a task of lm-eval; may be given several times.")
    ] = None,
    tasks_at: Annotated[
        Path | None, typer.Option(exists=True, help="Folder with task files of your own for lm-eval.")
    ] = None,
) -> None:
    """Measure a finished run, or the untrained model of a configuration."""
    from toast.files.atomic import strict_json
    from toast.training.config_files import load_config

    load_config(config, overrides or ()).check_split(split)
    from toast.training.measuring import measure

    figures = measure(config, overrides or (), split, predictions, lm_eval or (), tasks_at)
    say(strict_json(figures, indent=2))

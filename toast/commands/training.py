"""The commands that train and measure, and the list of the configurations that the package ships."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toast.commands.errors import Command
from toast.files.atomic import strict_json

if TYPE_CHECKING:
    from toast.training.preparing import Stage

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a run's folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Replace settings of the file, such as optimizer.learning_rate=1e-3."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]


def _train(stage: Stage, config: Path, overrides: list[str] | None, dry_run: bool, resume: bool) -> None:
    from toast.training.config_files import load_config
    from toast.training.dry_run import dry_run as show
    from toast.training.run import run

    loaded = load_config(config, overrides or ())
    if dry_run:
        show(loaded, stage)
        return
    result = run(loaded, stage, resume)
    _say(_summary(result, loaded.folder))


def _say(text: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)


def _summary(result: dict[str, Any], place: Path) -> str:
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
    from toast.training.measuring import measure

    figures = measure(config, overrides or (), split, predictions, lm_eval or (), tasks_at)
    _say(strict_json(figures, indent=2))


def sweep(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
) -> None:
    """Search a grid on the validation split, then measure the best of each row on the test split.

    Finished runs are not repeated: call it again to continue.
    """
    from toast.training.config_files import load_config
    from toast.training.sweep import sweep as run_sweep

    run_sweep(load_config(config, overrides or ()), dry_run)


def configs() -> None:
    """List the shipped configurations, each with the command that it is written for.

    toast finds configs/... from any folder, unless the working folder has a file of the same path.
    """
    from toast.training.shipped import shipped_commands, shipped_folder

    typer.echo(f"configs/ is {shipped_folder()}")
    for command in shipped_commands():
        typer.echo(command)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    for command in (pretune, tune, evaluate, sweep, configs):
        app.command()(command)


def script(command: Callable[..., None]) -> None:
    """Runs a command as a script whose configuration is the option `--config`."""
    arguments = sys.argv[1:]
    if "--config" in arguments:
        place = arguments.index("--config")
        arguments = [*arguments[place + 1 : place + 2], *arguments[:place], *arguments[place + 2 :]]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(command)
    try:
        app(arguments)
    finally:
        from accelerate import PartialState

        PartialState().destroy_process_group()

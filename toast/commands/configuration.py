"""What the commands of the training program are given: a configuration, and settings on top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a run's folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the file, such as optimizer.learning_rate=1e-3.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]

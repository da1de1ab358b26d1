"""The command `toast sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from toast.commands.configuration import Config, Overrides


def sweep(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
) -> None:
    """Search a grid on the validation split, then measure the best of each row on the test split.

    Finished runs are not repeated: call it again to continue.
    """
    from toast.training.config_files import load_config

    loaded = load_config(config, overrides or ())
    loaded.checked_sweep()
    from toast.training.sweeping import sweep as run_sweep

    run_sweep(loaded, dry_run)

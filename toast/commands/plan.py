"""The command `toast plan`: what a run would need on one or many accelerators."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from toast.commands.configuration import Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many share the work, one accelerator each.")] = 1,
    memory: Annotated[str, typer.Option(help="What each accelerator has, such as 80GB or 24GiB.")] = "80GB",
    stage: Annotated[
        str | None, typer.Option(help="pretune or tune; the configuration's, if it is for one of them.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Vision: classes of the data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of tables.")] = False,
) -> None:
    """Tell memory, operations and traffic of a run from its configuration alone; no weights, no data."""
    from toast.planning.estimating import plan as make_plan
    from toast.planning.memory_size import parse_size
    from toast.planning.printing import print_plan
    from toast.training.config_files import load_config

    if stage not in (None, "pretune", "tune"):
        raise ValueError(f"stage: needs pretune or tune; got {stage!r}.")
    size = parse_size(memory)
    found = make_plan(load_config(config, overrides or ()), stage, processes, size, classes)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_plan(found)

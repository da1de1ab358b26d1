"""The command `toast plan`: what a run would need on one or many accelerators."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from toast.commands.configuration import Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many share the work, one accelerator each.")] = 1,
    memory: Annotated[str, typer.Option(help="What each accelerator has, such as 80GB or 24GiB.")] = "80GB",
    stage: Annotated[
        Literal["pretune", "tune"] | None,
        typer.Option(help="Default: the configuration's, if it is for one of them."),
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Vision: classes of the data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of tables.")] = False,
) -> None:
    """Tell memory, operations and traffic of a run from its configuration alone; no weights, no data."""
    from toast.planning.memory_size import parse_size
    from toast.training.config_files import load_config

    size = parse_size(memory)
    loaded = load_config(config, overrides or ())
    from toast.planning.estimating import plan as make_plan
    from toast.planning.printing import print_plan

    found = make_plan(loaded, stage, processes, size, classes)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_plan(found)

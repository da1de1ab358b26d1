#!/usr/bin/env python3
"""Trains a configuration at several multiples of its learning rate, and says which of them do.

    python scripts/rate_sweep.py --config configs/rates/vit-192.yaml [KEY=VALUE]...

Everything is multiplied, rates of single groups too. Runs that are done are not done again. For each multiple
it prints the mean training loss of the first and the last quarter of the steps, and what is measured on the
validation split. Results: docs/rates.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toast.commands.errors import run_script
from toast.training.config_files import load_config
from toast.training.run import run
from toast.training.run_folder import METRICS


def main(
    config: Annotated[Path, typer.Option(help="Configuration of stage two.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    factors: Annotated[
        list[float], typer.Option("--factor", help="A multiple; may be given several times.")
    ] = [  # noqa: B006
        0.1,
        0.3,
        1,
        3,
        10,
    ],
) -> None:
    """Runs the sweep and prints its table."""
    base = load_config(config, overrides or ())
    table = Table("learning rate", "loss, first quarter", "loss, last quarter", "validation")
    for factor in factors:
        rate = base.optimizer.learning_rate * factor
        rates = {name: value * factor for name, value in base.optimizer.rates.items()}
        optimizer = base.optimizer.model_copy(update={"learning_rate": rate, "rates": rates})
        settings = base.model_copy(update={"out": base.folder, "name": f"{rate:g}", "optimizer": optimizer})
        result = run(settings, "tune", resume=True)
        losses = training_losses(settings.folder / METRICS)
        quarter = max(1, len(losses) // 4)
        table.add_row(
            f"{rate:g}", f"{fmean(losses[:quarter]):.3f}", f"{fmean(losses[-quarter:]):.3f}",
            said(result["validation"] or {}),
        )  # fmt: skip
    Console(soft_wrap=True).print(table)


def training_losses(path: Path) -> list[float]:
    """Reads the loss of every step."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def said(measured: dict[str, Any]) -> str:
    """Returns figures in a line."""
    shown = ("accuracy", "loss", "perplexity")
    return ", ".join(f"{name} {measured[name]:.3f}" for name in shown if name in measured)


if __name__ == "__main__":
    run_script(main)

"""Studies: which method pays when.

python scripts/study.py run configs/study/clutter.yaml [--only 'TOAST*'] [--set epochs=1] [--processes 8]
python scripts/study.py tables configs/study/*.yaml

What is done is not done again: call it again to go on. docs/training.md says what a study file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.commands.errors import Commands

app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting on top, such as epochs=1.")]
Results = Annotated[Path, typer.Option(help="Folder of the lines.")]
RESULTS = Path("results/study")


@app.command()
def run(
    config: Path,
    only: Annotated[list[str] | None, typer.Option(help="Rows by name or pattern, such as 'TOAST*'.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Tasks by name or pattern.")] = None,
    settings: Settings = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Rows side by side, a thread each by default.")] = 1,
    results: Results = RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing, and stop.")] = False,
) -> None:
    """Run what is missing of a study, and add a line for each run to RESULTS/NAME.jsonl."""
    import torch

    from toast.study.running import run_study
    from toast.study.side_by_side import run_side_by_side
    from toast.training.config_files import load_config

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_config(config, settings or ())
    if processes == 1 or dry_run:
        added = run_study(loaded, only or (), results, dry_run, tasks=task or ())
    else:
        added = run_side_by_side(loaded, processes, only or (), task or (), results, threads or 1)
    typer.echo(f"{added} lines added in {results}/")


@app.command()
def tables(configs: list[Path], settings: Settings = None, results: Results = RESULTS) -> None:
    """Make tables and figures of the lines: RESULTS/NAME.md and RESULTS/NAME-TASK.png."""
    from toast.study.figures import draw
    from toast.study.tables import page
    from toast.training.config_files import load_config
    from toast.training.run_folder import write_text

    for each in configs:
        config = load_config(each, settings or ())
        at = results / f"{config.name}.md"
        write_text(at, page(config, results))
        typer.echo("\n".join(str(path) for path in (at, *draw(config, results))))


if __name__ == "__main__":
    app()

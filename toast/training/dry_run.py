"""What a run would do, without doing it: settings, trained groups, steps, memory, and the first batch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from toast.training.accelerating import make_accelerator
from toast.training.allocations import Allocations
from toast.training.config_files import to_yaml
from toast.training.memory import estimate, optimizer_memory
from toast.training.optimizers import rated_groups
from toast.training.order import EpochBatches
from toast.training.preparing import Stage, prepare
from toast.training.run_config import RunConfig
from toast.training.trained_table import trained_table


def dry_run(config: RunConfig, stage: Stage, console: Console | None = None) -> dict[str, Any]:
    """Prepares a run, computes the loss of its first micro-batch, and prints what is known then.

    Nothing is written.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`.
        console: Where it is printed; None is the standard output.

    Returns:
        What is printed, beside the settings: `groups`, `rates`, `steps`, `memory` in bytes, `batch`, `loss`.

    Raises:
        ValueError: As a run would.
    """
    console = console or Console(soft_wrap=True)
    accelerator = make_accelerator(config)
    prepared = prepare(config, stage)
    splits = prepared.splits
    size = config.batch_size // config.micro_batches
    order = EpochBatches(len(splits.train), size, config.micro_batches, config.seed)
    mine = next(iter(order))[: max(1, size // accelerator.num_processes)]
    batch = splits.collate([splits.train[key] for key in mine])
    held = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    objective = prepared.objective.to(accelerator.device)
    with accelerator.autocast(), Allocations((*objective.parameters(), *objective.buffers())) as seen:
        out = objective(held, float(len(mine)))
    kept = seen.bytes_held
    losses = {name: float(value.detach()) for name, value in out.items()}
    trained = [p for parameters in prepared.method.groups.values() for p in parameters.values()]
    groups = {
        name: sum(p.numel() for p in parameters.values())
        for name, parameters in prepared.method.groups.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in groups}
    for part in rated_groups(
        prepared.method.model, prepared.method.groups, config.optimizer, prepared.input_sizes
    ):
        if part["lr"] not in rates[part["name"]]:  # its parts may differ in decay alone
            rates[part["name"]].append(part["lr"])
    total = config.steps or (config.epochs or 1) * order.steps
    result = {
        "groups": groups,
        "rates": rates,
        "steps": total,
        "steps_per_epoch": order.steps,
        "samples": splits.summary,
        "remarks": splits.remarks,
        "memory": estimate(prepared.method.model, optimizer_memory(trained, config.optimizer).states, kept),
        "batch": {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)},
        "losses": losses,
    }
    if accelerator.is_main_process:
        _print(console, config, prepared.method.model, result, accelerator.num_processes)
    return result


def _print(console: Console, config: RunConfig, model: Any, result: dict[str, Any], processes: int) -> None:
    console.print(to_yaml(config), highlight=False, markup=False)
    everything = sum(p.numel() for p in model.parameters())
    console.print(trained_table(result["groups"], everything, result["rates"]))
    memory = Table(title="memory of each process, estimated", title_justify="left")
    memory.add_column("for")
    memory.add_column("MiB", justify="right")
    for name, size in result["memory"].items():
        memory.add_row(name, f"{size / 2**20:,.1f}")
    memory.add_row("together", f"{sum(result['memory'].values()) / 2**20:,.1f}")
    console.print(memory)
    shapes = ", ".join(f"{name} {shape}" for name, shape in result["batch"].items())
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result["losses"].items())
    console.print(f"samples: {result['samples']}", markup=False, highlight=False)
    for remark in result["remarks"]:
        console.print(remark, markup=False, highlight=False)
    console.print(
        f"steps: {result['steps']:,} ({result['steps_per_epoch']:,} per epoch) of {config.batch_size} "
        f"samples, in {config.micro_batches} micro-batches on {processes} process{'es' * (processes > 1)}",
        highlight=False,
    )
    console.print(f"first batch: {shapes}\nits losses: {losses}", highlight=False)

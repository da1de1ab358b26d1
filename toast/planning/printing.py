"""A plan as tables: rows of text, which the terminal and docs/scale.md show alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from toast.planning.estimating import Plan, ProcessRow
from toast.planning.memory_size import unit_of
from toast.planning.sharding import SHARDINGS
from toast.training.trained_table import trained_table

#: What is kept for backward, in the order in which it is made.
PARTS = ("inputs", "first pass", "selection and feedback", "second pass", "head and loss", "forward")
#: What a process holds: title of the row, field of `ProcessRow`.
HELD = {
    "frozen weights": "frozen", "trained weights": "trained", "gradients": "gradients",
    "optimiser": "optimizer", "gathered, buckets": "buffers", "activations": "activations",
    "**peak**": "peak", "sent a step": "sent",
}  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Args:
        title: What it shows.
        columns: Titles of the columns; the first is that of the rows.
        rows: The cells, the first being the row's title. `**` stands around what counts most.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def step_sheet(plan: Plan) -> Sheet:
    """Returns what a micro-batch keeps and computes, a column for each way of making a step."""
    unit, size = unit_of(max(row.peak for row in plan.steps))
    rows = [
        [f"kept: {part}", *(f"{row.kept.get(part, 0.0) / size:,.2f}" for row in plan.steps)]
        for part in PARTS
        if any(row.kept.get(part) for row in plan.steps)
    ]
    rows.append(["**peak**", *(f"{row.peak / size:,.2f}" for row in plan.steps)])
    if plan.steps[0].form:
        rows.append(["feedback", *(row.form.replace("_", " ") for row in plan.steps)])
    rows.append(["10¹² operations", *(_three_digits(row.flops / 1e12) for row in plan.steps)])
    for title, name in (("× a LoRA step", "of_lora"), ("× a plain forward", "of_forward")):
        ratios = [getattr(row, name) for row in plan.steps]
        if None not in ratios:
            rows.append([title, *(f"{ratio:.2f}" for ratio in ratios)])
    title = f"a micro-batch of {plan.micro_batch}, beside weights and optimiser, in {unit}"
    return Sheet(title, ["", *(row.way for row in plan.steps)], rows)


def process_sheets(plan: Plan) -> Iterator[Sheet]:
    """Yields what a process holds, a table for each precision of the base, a column for each way to split."""
    unit, size = unit_of(max(row.peak for row in plan.ways))
    for base in dict.fromkeys(row.base for row in plan.ways):
        ways = [row for row in plan.ways if row.base == base]
        rows = [
            [title, *(f"{getattr(row, name) / size:,.2f}" for row in ways)] for title, name in HELD.items()
        ]
        rows.append(["**samples that fit**", *map(_fitting, ways)])
        processes = f"{plan.processes} process{'es' * (plan.processes > 1)}"
        title = f"base {base}, {processes} of {plan.memory / size:,.4g} {unit}; in {unit}"
        yield Sheet(title, ["split", *(SHARDINGS[row.sharding].title for row in ways)], rows)


def generation_line(plan: Plan) -> str:
    """Returns what generating needs; nothing where that was not planned."""
    if plan.generation is None:
        return ""
    found = plan.generation
    unit, size = unit_of(found.peak)
    return (
        f"generation, a prompt of {found.tokens:,} tokens: {found.cache / size:,.2f} {unit} of keys and "
        f"values (without steering {found.plain_cache / size:,.2f}); the prompt's peak beside the weights is "
        f"{found.peak / size:,.2f}"
    )


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan.

    Args:
        plan: The plan.
        console: Where it is printed; None is the standard output.
    """
    console = console or Console(soft_wrap=True)
    computed = "float32" if plan.precision == "no" else plan.precision
    parts = f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)} of {plan.micro_batch}"
    first = (
        f"{plan.model}: {plan.method}, {plan.stage}, computed in {computed}; {parts} a step in each process"
    )
    console.print(first, highlight=False, markup=False)
    console.print(trained_table(plan.groups, plan.frozen + sum(plan.groups.values())))
    for sheet in (step_sheet(plan), *process_sheets(plan)):
        console.print(_drawn(sheet))
    for line in filter(None, (generation_line(plan), *plan.remarks)):
        console.print(line, highlight=False, markup=False)


def _three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.10g}"


def _fitting(row: ProcessRow) -> str:
    return "any" if row.largest is None else f"{row.largest:,}"


def _drawn(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for index, title in enumerate(sheet.columns):
        table.add_column(title, justify="right" if index else "left")
    for cells in sheet.rows:
        bold = cells[0].startswith("**")
        table.add_row(*(cell.strip("*") for cell in cells), style="bold" if bold else "")
    return table

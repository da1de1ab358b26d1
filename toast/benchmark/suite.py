"""`toast benchmark`: runs the measures, prints a table, writes a JSON file and a picture."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toast.benchmark import costs
from toast.benchmark.contenders import FULL, SMALL, Place, Size
from toast.benchmark.names import check_names
from toast.benchmark.picture import draw
from toast.benchmark.timing import Ratio
from toast.files.atomic import beside, strict_json, try_folder

Results = dict[str, dict[str, Ratio]]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEPS = [
    "full tuning", "VPT-deep", "textbook", "TOAST", "TOAST-Lite", "TOAST, stored", "TOAST-Lite, stored",
    "TOAST, top half", "TOAST, top half, stored",
]  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        title: What is measured, and against what.
        run: Runs it; gets sizes and rounds.
    """

    title: str
    run: Callable[[Size, int], dict[str, Ratio]]


def _steps(batch: int) -> Measure:
    return Measure(
        f"training step, batch {batch}, × LoRA's", lambda size, n: costs.step(size, _STEPS, batch, n)
    )


#: The measures by name, in the order in which they run.
MEASURES: dict[str, Measure] = {
    "forward": Measure(
        "forward, batch 8, × plain",
        lambda size, n: costs.forward(
            size,
            ["LoRA", "VPT-deep", "textbook", "TOAST", "TOAST, fused", "TOAST, fused, top half"],
            8, 2 * n,
        ),
    ),
    "depth": Measure(
        "fused forward by batch size and by the block from which it is steered, × plain",
        lambda size, n: costs.depth(size, [1, 4, 16], n),
    ),
    "tasks": Measure(
        "4 adapters in one call, batch 8, × a call for each", lambda size, n: costs.tasks(size, 4, 8, n)
    ),
    "step-16": _steps(16),
    "step-32": _steps(32),
    "memory": Measure(
        "peak memory of a training process, batch 16, × LoRA's",
        lambda size, n: costs.memory(size, [*_STEPS[:5], *_STEPS[7:8]], 16),
    ),
    "waits": Measure(
        "waits of the host for the device in a training step, batch 16 (CUDA)",
        lambda size, n: costs.waits(size, [*_STEPS[2:8]], 16),
    ),
    "decode": Measure(
        "tokens per second, batch 1, × plain",
        lambda size, n: costs.decode(
            size,
            ["LoRA", "textbook", "TOAST", "TOAST, fused", "TOAST, fused, top half", "TOAST, prompt alone"],
            n,
        ),
    ),
    "prefill": Measure(
        "prefill, × plain",
        lambda size, n: costs.prefill(
            size, ["LoRA", "textbook", "TOAST", "TOAST, fused", "TOAST, fused, top half"], 2 * n
        ),
    ),
    "checkpoint": Measure(
        "size of the adapter's file, × the backbone's parameters", lambda size, n: costs.checkpoint(size)
    ),
    "help": Measure("toast --help, seconds", lambda size, n: {"toast --help": costs.help_seconds(n)}),
}  # fmt: skip


def run(
    out: Path,
    only: list[str],
    rounds: int,
    threads: int | None,
    small: bool,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool = False,
) -> Results:
    """Runs measures and writes `benchmark.json` after each.

    Args:
        out: Folder for the results.
        only: Names of measures; empty for all.
        rounds: Rounds of each comparison.
        threads: Threads of PyTorch; None leaves its choice.
        small: Whether to use tiny models, to see that it runs.
        device: `cpu`, `cuda`, `mps`, `xpu`, or `auto` for the accelerator that there is.
        dtype: `float32`, or `bfloat16` or `float16`, both under autocast.
        compiled: Whether models are compiled.

    Raises:
        ValueError: If a measure or precision is unknown, or the device is not there.
    """
    check_names(only)
    size = replace(SMALL if small else FULL, place=place_of(device, dtype, compiled))
    try_folder(out, "out")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    found: Results = {}
    for name in only or MEASURES:
        measure = MEASURES[name]
        found[name] = measure.run(size, rounds)
        if not found[name]:
            print(f"{measure.title}: not on this device\n", flush=True)  # noqa: T201 - a command's output
            continue
        print(_table(measure.title, found[name]), flush=True)  # noqa: T201
        _write(out / "benchmark.json", found, size)
        if name == "depth":
            draw(found[name], out / "depth.png")
    print(f"written: {out / 'benchmark.json'}")  # noqa: T201
    return found


def place_of(device: str, dtype: str, compiled: bool) -> Place:
    """Returns where and how the contenders run.

    Raises:
        ValueError: If the precision is unknown, or the device is not there.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: needs one of {', '.join(_DTYPES)}; got {dtype!r}.")
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        device = "cpu" if there is None else there.type
    if device != "cpu" and (there is None or there.type != device):
        raise ValueError(
            f"device: needs cpu, or the accelerator that PyTorch finds here, {there or 'which is none'}; got "
            f"{device!r}."
        )
    return Place(torch.device(device), _DTYPES[dtype], compiled)


def card(device: torch.device) -> str:
    """Returns the name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _table(title: str, ratios: dict[str, Ratio]) -> str:
    width = max(len(name) for name in ratios)
    lines = [f"  {name:{width}}  {ratio}" for name, ratio in ratios.items()]
    return "\n".join([f"{title}: median (its 95% interval), CPU time, FLOPs, floor", *lines, ""])


def _write(path: Path, found: Results, size: Size) -> None:
    place = size.place
    machine: dict[str, Any] = {
        "device": card(place.device), "dtype": str(place.dtype), "compiled": place.compiled,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
    }  # fmt: skip
    ratios = {name: {who: ratio.as_dict() for who, ratio in each.items()} for name, each in found.items()}
    with beside(path) as new:
        new.write_text(strict_json({"machine": machine, "ratios": ratios}, indent=1))

"""Loss against steps of a model that starts from random weights, and from those of a larger one.

    python scripts/selection_curves.py --out docs/weight_selection.png

The architecture of the embedded backbone (width 192, 3 heads) learns the folders of the package's generic
pictures from random weights, and from weights selected of a ViT-S/14 (width 384, 6 heads) in several ways.
The loss is that of held-out pictures, composed of the same clip-art. Results: docs/weight_selection.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import toast
from toast.commands.errors import run_script
from toast.embedded.backbone import new_backbone
from toast.embedded.task import Pictures, load_generic, load_materials, normalise
from toast.files.atomic import beside

#: How a student starts, with the options of `toast.select_weights`; None: from random weights.
STARTS: dict[str, dict[str, str] | None] = {
    "random weights": None,
    "uniform": {},
    "consecutive": {"elements": "consecutive"},
    "random elements": {"elements": "random"},
}
ASSETS = Path(os.environ.get("TOAST_ASSETS", Path.home() / ".cache" / "toast-assets"))
TEACHER = ASSETS / "vit_small" / "model.safetensors"


def start(name: str, teacher: nn.Module, seed: int) -> nn.Module:
    """Returns a student as it starts; its head is the same for every start of a seed."""
    torch.manual_seed(seed)
    student = new_backbone(num_classes=len(load_materials().folders))
    options = STARTS[name]
    return student if options is None else toast.select_weights(student, teacher, seed=seed, **options)


def train(
    student: nn.Module, pictures: Pictures, held_out: Pictures, seed: int, steps: int, every: int, rate: float
) -> list[float]:
    """Trains a student and returns its held-out loss before the first step and after every few."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step in tqdm(range(steps + 1), leave=False):
        if step % every == 0:
            losses.append(loss_of(student, held_out))
        if step < steps:
            rows = torch.randint(len(pictures.labels), (16,), generator=draw)
            loss = F.cross_entropy(student(normalise(pictures.images[rows])), pictures.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return losses


@torch.no_grad()
def loss_of(student: nn.Module, pictures: Pictures) -> float:
    """Returns the mean loss over pictures."""
    outputs = torch.cat([student(normalise(part)) for part in pictures.images.split(100)])
    return float(F.cross_entropy(outputs, pictures.labels))


def draw_curves(curves: dict[str, Tensor], at: list[int], out: Path) -> None:
    """Draws each start's mean, and a band from the lowest seed to the highest."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="held-out loss", xlim=(0, at[-1]))
    for name, curve in curves.items():
        (line,) = axes.plot(at, curve.mean(0), label=name)
        axes.fill_between(at, curve.amin(0), curve.amax(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with beside(out) as new:
        figure.savefig(new, format="png", dpi=110)


def main(
    teacher: Annotated[Path, typer.Option(help="Weights of a ViT-S/14 with layer scale.")] = TEACHER,
    steps: int = 80,
    every: Annotated[int, typer.Option(help="Steps between two points of a curve.")] = 20,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    seeds: int = 2,
    starts: Annotated[list[str], typer.Option("--start")] = list(STARTS),  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Where the picture goes.")] = None,
) -> None:
    """Prints the table and draws the picture."""
    weights = load_file(teacher)
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"].float(), [8, 8], num_prefix_tokens=1)
    larger = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=0)
    larger.load_state_dict(weights)
    pictures, held_out = load_generic(2000, seed=0), load_generic(200, seed=1)
    curves = {
        name: torch.tensor(
            [
                train(start(name, larger, seed), pictures, held_out, seed, steps, every, rate)
                for seed in range(seeds)
            ]
        )
        for name in starts
    }
    at = list(range(0, steps + 1, every))
    shown = at[:: max(1, len(at) // 4)]
    table = Table("start", *(f"step {step}" for step in shown))
    for name, curve in curves.items():
        cells = [curve[:, at.index(step)] for step in shown]
        table.add_row(name, *(f"{cell.mean():.2f} ({cell.min():.2f} to {cell.max():.2f})" for cell in cells))
    Console(soft_wrap=True).print(table)
    if out is not None:
        draw_curves(curves, at, out)


if __name__ == "__main__":
    run_script(main)

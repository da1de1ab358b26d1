#!/usr/bin/env python3
"""How far ten steps move what a steered model computes, by width: a coordinate check (arXiv 2203.03466).

    python scripts/coordinate_check.py --rate 3e-3

Random ViTs whose features have unit size at every width are trained for ten steps of AdamW, with the learning
rate for all (`plain`) and with `toast.parameter_groups`. Where rates suit every width, a column stays about
the same. Results: docs/rates.md.

- chain: change of y_0 = A_0 … A_{L-1} z against z, what `to_state` has done to all blocks' states together;
- signals: size of the signals against that of what enters their blocks, mean over blocks;
- turn: angle in radians by which the task embedding has turned;
- outputs: change of the logits against their size (the head is frozen).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from statistics import median
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from toast.commands.errors import run_script
from toast.steering import steering_of


@dataclass(frozen=True)
class Moved:
    """What ten steps have moved, see the top of the file."""

    chain: float
    signals: float
    turn: float
    outputs: float


def backbone(width: int, depth: int) -> nn.Module:
    """A random ViT on pictures of 16 pixels whose maps keep the size of what they get, at every width."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=width // 24, num_classes=8
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    for parameter in (model.cls_token, model.pos_embed):
        nn.init.normal_(parameter)
    return model


def move(
    width: int, rate: float, scaled: bool, depth: int = 6, steps: int = 10, seed: int = 0, **options: object
) -> Moved:
    """Trains for a few steps and measures.

    Args:
        width: Channels, a multiple of 24.
        rate: The learning rate.
        scaled: Whether rates follow the width.
        depth: Blocks.
        steps: Steps of AdamW.
        seed: Of the weights and pictures.
        **options: Fields of `ToastConfig`.
    """
    torch.manual_seed(seed)
    model = toast.wrap(backbone(width, depth), **options)
    pictures, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    toast.calibrate(model, pictures)
    optimizer = torch.optim.AdamW(toast.parameter_groups(model, rate, scaled=scaled))
    embedding = steering_of(model, "move")[1].task_embedding
    before, logits = embedding.detach().clone(), model(pictures).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
    with torch.no_grad():
        seen = toast.trace(model, pictures, block_states=True)
        state = seen.selected
        for maps in reversed(steering_of(model, "move")[1].maps):
            state = maps.bring_down(state)
        entering = [seen.states[block][0] for block in range(depth)]
        return Moved(
            chain=_size(state - seen.selected) / _size(seen.selected),
            signals=sum(map(_share, seen.signals, entering)) / depth,
            turn=float(torch.arccos(F.cosine_similarity(before, embedding, dim=0).clamp(-1, 1))),
            outputs=_size(model(pictures) - logits) / _size(logits),
        )


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _share(signal: Tensor, entering: Tensor) -> float:
    return _size(signal) / _size(entering)


def main(
    rate: Annotated[float, typer.Option(help="Learning rate of a head or of LoRA.")] = 3e-3,
    widths: Annotated[list[int], typer.Option("--width")] = [96, 192, 384, 768],  # noqa: B006
    depth: Annotated[int, typer.Option(help="Blocks.")] = 6,
    seeds: Annotated[int, typer.Option(help="Runs whose median is shown.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Above 0: TOAST-Lite.")] = 0,
) -> None:
    """Prints the table."""
    names = list(Moved.__dataclass_fields__)
    table = Table("rates", "width", *names)
    for scaled in (False, True):
        for width in widths:
            runs = [
                astuple(move(width, rate, scaled, depth, seed=s, lora_rank=lora_rank)) for s in range(seeds)
            ]
            figures = [f"{median(column):.3f}" for column in zip(*runs, strict=True)]
            table.add_row("parameter_groups" if scaled else "plain", str(width), *figures)
        table.add_section()
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    run_script(main)

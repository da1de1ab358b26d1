"""Attention maps as the models' own eager code computes them, seen by hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import toast
from tests.models import awaken
from toast.visual.seeing import find_parts


def steer(bare: nn.Module, x: Tensor, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero: the task embedding resembles what is read."""
    model = awaken(toast.wrap(bare, **options)).eval()
    with torch.no_grad():
        toast.calibrate(model, x)
    return model


def dropped(model: nn.Module, x: Tensor) -> dict[int, list[Tensor]]:
    """What enters timm's attention dropout in a call, by block; one entry a pass."""
    slow = copy.deepcopy(model)
    seen: dict[int, list[Tensor]] = {}
    for number, attention in enumerate(find_parts(slow).attentions):
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(
            lambda _, args, number=number: seen.setdefault(number, []).append(args[0])
        )
    slow(x)
    return seen


def shares(attention: Tensor, prefix: int, rows: int, query: str, head: int | str) -> tuple[Tensor, Tensor]:
    """The map of one attention, and the share on patches: by loops over pictures, heads and queries."""
    chosen = range(attention.shape[1]) if head == "mean" else [head]
    maps, totals = [], []
    for picture in attention:
        asking = [0] if query == "class" else range(prefix, picture.shape[-1])
        asked = torch.stack([picture[h, q] for h in chosen for q in asking]).mean(0)[prefix:]
        totals.append(asked.sum())
        maps.append((asked / asked.sum()).view(rows, -1))
    return torch.stack(maps), torch.stack(totals)

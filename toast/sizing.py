"""`toast.input_sizes`: how large a block's input is beside the features that are sent down to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from toast.compiled import eagerly
from toast.families.tokens import channels_last
from toast.reusing import first_pass
from toast.steering import steering_of
from toast.value import ToastValue


@torch.no_grad()
def input_sizes(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, float]:
    """Returns the size of what enters each value projection, relative to that of the features sent down.

    A signal is added to that input. So a step that changes the signal by as much as the features' size is a
    small change where the ratio is 1, as in most vision models, and 6 times the input itself in the language
    models whose norms scale it down (SmolLM2: 0.03 in the first block, 0.1 to 0.19 above). Given to
    `toast.parameter_groups`, the ratios lower the rates of the maps that make signals.

    Args:
        model: A wrapped model, not sharded yet.
        *inputs: Inputs of one call of the model, such as a batch of images. A few samples are enough.
        **kwargs: The same.

    Returns:
        By name of the value projection, the size of its inputs in the plain model over that of the features;
        the size is the median over tokens of their root mean square, which a few massive activations do not
        move. Projections are left out whose attention takes their weight and does not call them (BEiT, EVA,
        Swin V2).

    Raises:
        ValueError: If the model has no active TOAST adapter, or a size is 0 or not finite.

    Example:
        >>> import timm, toast, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224").eval()
        >>> model = toast.wrap(vit, steer_from=10)
        >>> sizes = toast.input_sizes(model, torch.randn(2, 3, 224, 224))
        >>> {name: f"{size:.1f}" for name, size in sizes.items()}
        {'blocks.10.attn.qkv': '1.0', 'blocks.11.attn.qkv': '1.0'}
        >>> optimizer = torch.optim.AdamW(toast.parameter_groups(model, 1e-3, input_sizes=sizes))
    """
    steering, adapter = steering_of(model, "input_sizes")
    with eagerly(model), ExitStack() as stack:
        stored = first_pass(model, *inputs, **kwargs)
        sent_down = stored.normed if adapter.config.select_features == "normed" else stored.unnormed
        assert sent_down is not None
        measured: dict[str, float] = {}
        for layer in steering.values:
            hook = layer.base_layer.register_forward_pre_hook(_measure(measured, layer))
            stack.callback(hook.remove)
        with steering.holding(None):
            model(*inputs, **kwargs)
    size = _size(sent_down)
    sizes = {name: value / size if size else math.nan for name, value in measured.items()}
    wrong = [name for name, value in sizes.items() if not 0 < value < math.inf]
    if wrong:
        raise ValueError(
            f"input_sizes needs samples that give finite features and inputs above 0; {wrong[0]} has "
            f"{measured[wrong[0]]:g}, the features {size:g}."
        )
    return sizes


def _measure(measured: dict[str, float], layer: ToastValue) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        measured[layer.unit.name] = _size(channels_last(args[0], layer.tokens))

    return hook


def _size(x: Tensor) -> float:
    """Returns the median over tokens of their root mean square; channels last."""
    return float(x.detach().float().square().mean(-1).sqrt().median())

"""The value layer of a block: its two maps of the feedback path, and the values of `x + s`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.config import ToastConfig
from toast.families.anatomy import Unit
from toast.families.layouts import Layout, is_plain, may_write
from toast.families.tokens import channels_last, like_map
from toast.functional import SteeredWeight
from toast.layer import ToastLayer
from toast.passes import Pass
from toast.saving.names import FACTORS
from toast.signals import Signal
from toast.thread_state import current_pass, current_signals

OUTSIDE = (
    "a steered block runs outside of a call of its trunk, so it has no signal. If activation checkpointing "
    "recomputes it, checkpoint with the library's own switch (gradient_checkpointing_enable of transformers, "
    "set_grad_checkpointing of timm), not re-entrant; to run blocks by themselves, disable the adapter."
)


class FeedbackMap(nn.Linear):
    """A feedback map of full TOAST, `A_l` or `B_l`: a linear map without bias.

    By its own class, what shards a model class by class can tell it from the backbone's linear maps: FSDP has
    to gather each map when it is called, between the two passes and outside of the block that holds it.
    """


class LowRankMap(nn.Module):
    """A feedback map of TOAST-Lite: frozen, plus trained low-rank factors.  y = (W + α/r B A) x.

    It belongs to one adapter of its block, as a plain map does. It is none of PEFT's LoRA layers: PEFT and
    transformers reach into every tuner layer that they find, to switch, scale, freeze and count it.

    Args:
        base_layer: The map `W` that is frozen.
        config: Says rank, alpha and dropout.
    """

    def __init__(self, base_layer: nn.Linear, config: ToastConfig) -> None:
        super().__init__()
        out, width = base_layer.weight.shape
        fresh: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        down = nn.Linear(width, config.lora_rank, bias=False, **fresh)
        up = nn.Linear(config.lora_rank, out, bias=False, **fresh)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # as in the LoRA paper's code; the product is 0
        nn.init.zeros_(up.weight)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({FACTORS: down})
        self.lora_B = nn.ModuleDict({FACTORS: up})
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scaling = (config.lora_alpha or 1.0) / config.lora_rank

    def forward(self, x: Tensor) -> Tensor:
        """Maps states, `(..., width)`."""
        low: Tensor = self.lora_A[FACTORS](self.dropout(x))
        return self.base_layer(x) + self.lora_B[FACTORS](low) * self.scaling  # type: ignore[no-any-return]


class ToastValue(ToastLayer):
    """Wraps what makes the values of one block, and holds that block's two maps of the feedback path.

    y_l = A_l y_{l+1} (`to_state`),  s_l = B_l y_l (`to_signal`),  V_l = W_V (x_l + s_l).

    Args:
        base_layer: The module that makes the values.
        unit: Its place in the feedback path.
        tokens: The family's order of tokens, see `toast.families.tokens`.
        functional: Whether the attention takes the weight of the module and does not call it.
    """

    adapter_layer_names = ("toast_to_state", "toast_to_signal")

    def __init__(self, base_layer: nn.Module, unit: Unit, tokens: str, functional: bool) -> None:
        super().__init__(base_layer, unit.width)
        self.unit = unit
        self.tokens = tokens
        self.functional = functional
        self.toast_to_state = nn.ModuleDict()
        self.toast_to_signal = nn.ModuleDict()

    @property
    def layout(self) -> Layout:
        """Where the values lie in the module's output."""
        return self.unit.layout

    @property
    def out_features(self) -> int:
        """Channels of the projection's output: of a fused one, queries and keys included."""
        return self.layout.out

    @property
    def value_width(self) -> int:
        """Channels of the values."""
        return self.unit.layout.value_width

    @property
    def value_weight(self) -> Tensor | None:
        """W_V, `(value_width, width)`; None if the module's weight does not say what it computes."""
        return self.layout.value_weight(self.base_layer)

    @property
    def can_shift(self) -> bool:
        """Whether W_V is known, so that values can be shifted by W_V s."""
        return self.value_weight is not None

    def update_layer(self, adapter: str, config: ToastConfig, fresh: dict[str, Any]) -> None:
        """Adds the two linear maps of an adapter, each with LoRA factors for TOAST-Lite.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            fresh: `device` and `dtype` of new parameters.
        """
        self.configs[adapter] = config
        # Between blocks that differ in tokens or width there is no identity: an isometry stands for it.
        rows, above = self.unit.to_state_shape
        start = nn.init.eye_ if rows == above else _isometry_
        for maps, shape, identity in (
            (self.toast_to_state, (above, rows), start),
            (self.toast_to_signal, (self.width, self.width), nn.init.zeros_),
        ):
            linear = (nn.Linear if config.is_lite else FeedbackMap)(*shape, bias=False, **fresh)
            if config.init == "official":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            else:
                identity(linear.weight)
            maps[adapter] = LowRankMap(linear, config) if config.is_lite else linear

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the feedback maps and their LoRA factors."""
        for group, maps in (("to_state", self.toast_to_state), ("to_signal", self.toast_to_signal)):
            for name, parameter in maps[adapter].named_parameters():
                yield ("lora" if "lora_" in name else group), parameter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the projection; in a pass that holds a signal for this block, with the values of `x + s`."""
        call = current_pass()
        if call is None:
            if self.adapter is not None:
                raise RuntimeError(OUTSIDE)
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        call.enter(self.unit)
        if call.wants_states and self.layout.name == "input":
            assert call.observer is not None
            call.observer.on_states(call.number, self.unit.number, channels_last(x, self.tokens))
        signal = self._signal(call, x)
        if signal is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if isinstance(signal, Tensor):
            return self.layout.steer(self.base_layer, x, signal, call.bias_twice)
        return self.layout.run_and_shift(self.base_layer, x, signal.value_shift(x.dtype), call.bias_twice)

    @property
    def weight(self) -> Tensor:
        """Weight of the module; for an attention that does not call it, one that steers its product."""
        weight: Any = self.base_layer.weight
        call = current_pass()
        if not self.functional or call is None:
            return weight  # type: ignore[no-any-return]
        call.enter(self.unit)
        if self.unit.number not in call.signals:
            return weight  # type: ignore[no-any-return]
        if not is_plain(weight):
            raise ValueError(
                f"the attention multiplies with a {type(weight).__name__} by itself, which cannot be "
                "steered. Let it call the projection: set qkv_bias_separate=True on every attention."
            )
        return SteeredWeight.of(weight, functools.partial(self.steer_product, call))

    def steer_product(self, call: Pass, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns `F.linear(x, weight, bias)` with the values of `x + s`."""
        out = F.linear(x, weight, bias)
        signal = self._signal(call, x)
        assert signal is not None
        if isinstance(signal, Tensor):
            shift = F.linear(signal.to(x.device, x.dtype), self.layout.rows(weight))
        else:
            shift = signal.value_shift(x.dtype)
        if call.bias_twice and bias is not None:
            shift = shift + self.layout.rows(bias)
        return self.layout.shift(out, shift, fresh=may_write())

    def _signal(self, call: Pass, x: Tensor) -> Signal | None:
        """Returns the signal of a pass in the order of tokens of what comes in."""
        if not call.signals:
            return None
        here = current_signals()
        signal = call.signal_of(self.unit.number) if here is None else here[self.unit.place]
        return like_map(signal, x) if self.tokens == "map" and isinstance(signal, Tensor) else signal


@torch.no_grad()
def _isometry_(weight: Tensor) -> None:
    """Fills a weight with orthonormal rows or columns; in float32, which is as low as the library goes."""
    if not weight.is_meta:
        weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device)))

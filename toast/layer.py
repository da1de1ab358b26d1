"""The two adapter layers: the selector around the final norm, the steered value projections in the blocks.

All parameters of TOAST live here, keyed by adapter name, as PEFT expects of a `BaseTunerLayer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from toast.anatomy import Unit
from toast.config import ToastConfig
from toast.feedback import Signal
from toast.functional import SteeredWeight
from toast.layouts import Layout
from toast.passes import Pass, current_pass
from toast.tokens import channels_last, like_map


class ToastLayer(nn.Module, BaseTunerLayer):
    """What selector and steered projections have in common: adapters by name, groups, one active at a time.

    Args:
        base_layer: The module that is wrapped.
        width: Channels of the features.
    """

    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.configs: dict[str, ToastConfig] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that acts now: None if disabled, deleted, or not of this layer."""
        if self.disable_adapters:
            return None
        active: Any = self.active_adapters
        return next((name for name in active if name in self.configs), None)

    @property
    def config(self) -> ToastConfig:
        """Configuration of the adapter that acts now."""
        assert self.adapter is not None
        return self.configs[self.adapter]

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter of an adapter with the name of its group."""
        raise NotImplementedError

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active, and trainable unless `inference_mode`.

        Raises:
            ValueError: If more than one TOAST adapter is named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        refuse_several(name for name in names if name in self.configs)
        super().set_adapter(names, inference_mode=inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Freezes the groups that an adapter does not train; PEFT calls it after every change of flags."""
        names = list(self.configs) if adapter_names is None else adapter_names
        for name in [names] if isinstance(names, str) else names:
            if name in self.configs:
                trained = self.configs[name].trained_groups
                for group, parameter in self.groups(name):
                    if group not in trained:
                        parameter.requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the signal depends on the input."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def refuse_several(names: Iterable[str]) -> None:
    """Refuses to make more than one TOAST adapter active."""
    several = list(names)
    if len(several) > 1:
        raise ValueError(
            "one TOAST adapter can be active at a time, because each needs a first pass of its own; "
            f"got {', '.join(several)}. Pass one name to set_adapter."
        )


OUTSIDE = (
    "a steered block runs outside of a call of its trunk, so it has no signal. If activation checkpointing "
    "recomputes it, checkpoint with the library's own switch (gradient_checkpointing_enable of transformers, "
    "set_grad_checkpointing of timm), not re-entrant; to run blocks by themselves, disable the adapter."
)

CANNOT_MERGE = (
    "TOAST cannot be merged into the weights: its signal depends on a first pass over each input. "
    "Keep the adapter (save_pretrained), or take it off with unload()."
)


class ToastSelector(ToastLayer):
    """Wraps the final norm: reads the features of the first pass and selects what matters for the task.

    Eq. of arXiv 2305.15542, section 3:  w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P.

    Args:
        base_layer: The final norm.
        width: Channels of the features.
        reads: How the norm takes part, see `Family.reads`.
        tokens: The family's order of tokens, see `toast.tokens`.
    """

    adapter_layer_names = ("toast_task_embedding", "toast_channel_transform")

    def __init__(self, base_layer: nn.Module, width: int, reads: str, tokens: str) -> None:
        super().__init__(base_layer, width)
        self.reads = reads
        self.tokens = tokens
        self.toast_task_embedding = nn.ParameterDict()
        self.toast_channel_transform = nn.ParameterDict()

    def update_layer(self, adapter: str, config: ToastConfig, fresh: dict[str, Any]) -> None:
        """Adds the parameters of an adapter: a random task embedding, the identity as channel transform.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            fresh: `device` and `dtype` of new parameters. The norm may have none of its own to go by.
        """
        self.configs[adapter] = config
        self._buffers.pop(f"{FUSED}{adapter}", None)  # it was made of other weights
        self.toast_task_embedding[adapter] = nn.Parameter(torch.randn(self.width, **fresh))
        self.toast_channel_transform[adapter] = nn.Parameter(torch.eye(self.width, **fresh))

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the task embedding `(width,)` and the channel transform `(width, width)`."""
        yield "task_embedding", self.toast_task_embedding[adapter]
        yield "channel_transform", self.toast_channel_transform[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the norm; in the first pass of this model it leaves input and output with the call."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        call = current_pass()
        if call is not None and call.reads is self and self.reads == "norm":
            call.features = self.read(x, out)
        return out

    def read(self, unnormed: Tensor, normed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns un-normed and normed features, channels last.

        Args:
            unnormed: What the blocks gave, in the family's order of tokens.
            normed: What the norm made of it; None if it was not given all of it.
        """
        if normed is None:
            normed = self.base_layer(unnormed) if self.reads == "block" else unnormed
        return channels_last(unnormed, self.tokens), channels_last(normed, self.tokens)

    def select(self, unnormed: Tensor | None, normed: Tensor | None) -> Selection:
        """Selects tokens, then channels.

        Args:
            unnormed: Features before the final norm, channels last; None if they are not read.
            normed: Features after it.
        """
        assert self.adapter is not None
        task_embedding = self.toast_task_embedding[self.adapter]
        compared, features = {
            "normed": (normed, normed),
            "unnormed": (unnormed, unnormed),
            "mixed": (normed, unnormed),
        }[self.config.select_features or "normed"]
        assert compared is not None
        assert features is not None
        compared, features = compared.to(task_embedding), features.to(task_embedding)
        weights = F.cosine_similarity(compared, task_embedding, dim=-1).clamp(0, 1)
        transform = self.toast_channel_transform[self.adapter]
        return Selection(features, weights, transform, self._buffers.get(f"{FUSED}{self.adapter}"))


#: What stands before the adapter's name in the name of a fused feedback's buffer.
FUSED = "fused_"


@dataclass
class Selection:
    """What the selector makes of the features. Channels last.

    Args:
        features: The features that were read, `(batch, tokens, width)`.
        weights: The selection weights, `(batch, tokens)`, from 0 to 1.
        channel_transform: P, `(width, width)`.
        fused: What maps the weighted features to all blocks' shifts, if the model is fused.
    """

    features: Tensor
    weights: Tensor
    channel_transform: Tensor
    fused: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Features after token selection: w · h."""
        return self.weights[..., None] * self.features

    @property
    def selected(self) -> Tensor:
        """Features after token and channel selection: (w · h) P."""
        return self.tokens @ self.channel_transform


#: Name of the one adapter in the LoRA layers of TOAST-Lite. It is part of the names of saved tensors.
FACTORS = "low_rank"


class LowRankMap(LoraLinear):
    """A feedback map of TOAST-Lite: frozen, plus trained low-rank factors.  y = (W + α/r B A) x.

    It is PEFT's LoRA layer with one adapter that is always on. PEFT and transformers reach into every tuner
    layer that they find to switch and freeze it; these factors follow the adapter that their map belongs to.

    Args:
        base_layer: The map `W` that is frozen.
        config: Says rank, alpha and dropout.
    """

    def __init__(self, base_layer: nn.Linear, config: ToastConfig) -> None:
        rank, alpha = config.lora_rank, config.lora_alpha
        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=config.lora_dropout)
        super().__init__(base_layer, FACTORS, config=lora, r=rank, lora_alpha=alpha)

    @property
    def weight(self) -> Tensor:
        """The whole map, `(width, width)`, without dropout; differentiable."""
        whole: Tensor = self.base_layer.weight + self.get_delta_weight(FACTORS)
        return whole

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Does nothing: the feedback map's own adapter decides."""

    def enable_adapters(self, enabled: bool) -> None:
        """Does nothing: the feedback map's own adapter decides."""

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Does nothing: the feedback map's own adapter decides."""


class ToastValue(ToastLayer):
    """Wraps what makes the values of one block, and holds that block's two maps of the feedback path.

    y_l = A_l y_{l+1} (`to_state`),  s_l = B_l y_l (`to_signal`),  V_l = W_V (x_l + s_l).

    Args:
        base_layer: The module that makes the values.
        unit: Its place in the feedback path.
        tokens: The family's order of tokens, see `toast.tokens`.
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
    def value_width(self) -> int:
        """Channels of the values."""
        return self.unit.layout.value_width

    @property
    def can_shift(self) -> bool:
        """Whether W_V is known, so that values can be shifted by W_V s."""
        return self.layout.value_weight(self.base_layer) is not None

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
            linear = nn.Linear(*shape, bias=False, **fresh)
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

    @property
    def maps(self) -> tuple[nn.Module, nn.Module]:
        """The two maps of the adapter that acts now: `to_state` and `to_signal`."""
        assert self.adapter is not None
        return self.toast_to_state[self.adapter], self.toast_to_signal[self.adapter]

    def bring_down(self, state: Tensor) -> Tensor:
        """Returns y_l = A_l y_{l+1}.

        Where the grid of tokens is finer here, A_l is a transposed convolution whose stride is its size: each
        coarse token gives the fine ones that it was made of.

        Args:
            state: y_{l+1}, `(batch, tokens, above)` or `(batch, rows, columns, above)`.
        """
        to_state = self.maps[0]
        weight = next(to_state.parameters())
        down: Tensor = to_state(state.to(weight.device))
        if self.unit.scale > 1:
            scale = self.unit.scale
            down = rearrange(down, "b h w (sh sw c) -> b (h sh) (w sw) c", sh=scale, sw=scale)
        return down

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the projection; in a pass that holds a signal for this block, with the values of `x + s`."""
        call = current_pass()
        if call is None:
            if self.adapter is not None:
                raise RuntimeError(OUTSIDE)
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        call.enter(self)
        if call.wants_states and self.layout.name == "input":
            assert call.observer is not None
            call.observer.on_states(call.number, self.unit.number, channels_last(x, self.tokens))
        signal = self._signal(call, x)
        if signal is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        bias_twice = self.config.value_bias == "twice"
        if isinstance(signal, Tensor):
            return self.layout.steer(self.base_layer, x, signal, bias_twice)
        return self.layout.run_and_shift(self.base_layer, x, signal.value_shift(x.dtype), bias_twice)

    @property
    def weight(self) -> Tensor:
        """Weight of the module; for an attention that does not call it, one that steers its product."""
        weight: Any = self.base_layer.weight
        call = current_pass()
        if not self.functional or call is None:
            return weight  # type: ignore[no-any-return]
        call.enter(self)
        if self not in call.signals:
            return weight  # type: ignore[no-any-return]
        if type(weight) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"the attention multiplies with a {type(weight).__name__} by itself, which cannot be "
                "steered. Let it call the projection: set qkv_bias_separate=True on every attention."
            )
        return SteeredWeight.of(weight, self, call)

    def steer_product(self, call: Pass, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns `F.linear(x, weight, bias)` with the values of `x + s`."""
        out = F.linear(x, weight, bias)
        signal = self._signal(call, x)
        assert signal is not None
        if isinstance(signal, Tensor):
            shift = F.linear(signal.to(x.device, x.dtype), self.layout.rows(weight))
        else:
            shift = signal.value_shift(x.dtype)
        if self.config.value_bias == "twice" and bias is not None:
            shift = shift + self.layout.rows(bias)
        return self.layout.shift(out, shift, fresh=True)

    def signal_like(self, shift: Tensor) -> Tensor:
        """Returns an empty signal for the tokens of a value shift, in the dtype of the feedback."""
        return next(self.maps[1].parameters()).new_empty((*shift.shape[:-1], self.width))

    def _signal(self, call: Pass, x: Tensor) -> Signal | None:
        """Returns the signal of a pass in the order of tokens of what comes in."""
        signal = call.arranged.get(self, call.signals.get(self))
        return like_map(signal, x) if self.tokens == "map" and isinstance(signal, Tensor) else signal


@torch.no_grad()
def _isometry_(weight: Tensor) -> None:
    """Fills a weight with orthonormal rows or columns; in float32, which is as low as the library goes."""
    if not weight.is_meta:
        weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, device=weight.device)))

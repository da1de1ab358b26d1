"""The two adapter layers: the selector around the final norm, the steered value projections in the blocks.

All parameters of TOAST live here, keyed by adapter name, as PEFT expects of a `BaseTunerLayer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from toast.config import ToastConfig
from toast.layouts import Layout, fresh_weight_like
from toast.passes import current_pass


class ToastLayer(nn.Module, BaseTunerLayer):
    """What selector and steered projections have in common: adapters by name, groups, one active at a time.

    Args:
        base_layer: The module that is wrapped.
        width: Channels of the features.
        device: Where new parameters go.
        dtype: Floating type of new parameters.
    """

    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, base_layer: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.configs: dict[str, ToastConfig] = {}
        self._fresh: dict[str, Any] = {"device": device, "dtype": dtype}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that acts now: None if disabled, deleted, or not of this layer."""
        if self.disable_adapters:
            return None
        active: list[str] = self.active_adapters
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
        own = [name for name in names if name in self.configs]
        if len(own) > 1:
            raise ValueError(
                f"one TOAST adapter can be active at a time, because each needs a first pass of its own; "
                f"got {', '.join(own)}. Pass one name to set_adapter."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        for module in self.modules():
            if isinstance(module, LoraLinear):  # the factors of TOAST-Lite follow their feedback map
                module.set_adapter(names, inference_mode=inference_mode)
        self._freeze_non_trainable_peft_weights(names)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Freezes the groups that an adapter does not train; PEFT calls it after every change of trainability."""
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


CANNOT_MERGE = (
    "TOAST cannot be merged into the weights: its signal depends on a first pass over each input. "
    "Keep the adapter (save_pretrained), or take it off with unload()."
)


class ToastSelector(ToastLayer):
    """Wraps the final norm: reads the features of the first pass and selects what matters for the task.

    Eq. of arXiv 2305.15542, section 3:  w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P.
    """

    adapter_layer_names = ("toast_task_embedding", "toast_channel_transform")

    def __init__(self, base_layer: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(base_layer, width, device, dtype)
        self.toast_task_embedding = nn.ParameterDict()
        self.toast_channel_transform = nn.ParameterDict()

    def update_layer(self, adapter: str, config: ToastConfig) -> None:
        """Adds the parameters of an adapter: a random task embedding, the identity as channel transform."""
        self.configs[adapter] = config
        self.toast_task_embedding[adapter] = nn.Parameter(torch.randn(self.width, **self._fresh))
        self.toast_channel_transform[adapter] = nn.Parameter(torch.eye(self.width, **self._fresh))

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the task embedding `(width,)` and the channel transform `(width, width)`."""
        yield "task_embedding", self.toast_task_embedding[adapter]
        yield "channel_transform", self.toast_channel_transform[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the norm; in the first pass of this model it leaves input and output with the call."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        call = current_pass()
        if call is not None and call.reads is self:
            call.features = (x, out)
        return out

    def select(self, unnormed: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Selects tokens, then channels.

        Args:
            unnormed: Features before the final norm, `(batch, tokens, width)`.
            normed: Features after it.

        Returns:
            The features that were read and the selected features, each `(batch, tokens, width)`, and between
            them the selection weights, `(batch, tokens)`, from 0 to 1.
        """
        assert self.adapter is not None
        task_embedding = self.toast_task_embedding[self.adapter]
        compared, features = {
            "normed": (normed, normed),
            "unnormed": (unnormed, unnormed),
            "mixed": (normed, unnormed),
        }[self.config.select_features or "normed"]
        compared, features = compared.to(task_embedding.dtype), features.to(task_embedding.dtype)
        weights = F.cosine_similarity(compared, task_embedding, dim=-1).clamp(0, 1)
        selected = (weights[..., None] * features) @ self.toast_channel_transform[self.adapter]
        return features, weights, selected


class ToastValue(ToastLayer):
    """Wraps what makes the values of one block, and holds that block's two maps of the feedback path.

    y_l = A_l y_{l+1} (`to_state`),  s_l = B_l y_l (`to_signal`),  V_l = W_V (x_l + s_l).
    """

    adapter_layer_names = ("toast_to_state", "toast_to_signal")

    def __init__(
        self, base_layer: nn.Module, width: int, device: torch.device, dtype: torch.dtype, layout: Layout
    ) -> None:
        super().__init__(base_layer, width, device, dtype)
        self.layout = layout
        self.toast_to_state = nn.ModuleDict()
        self.toast_to_signal = nn.ModuleDict()

    def update_layer(self, adapter: str, config: ToastConfig) -> None:
        """Adds the two linear maps of an adapter, each with LoRA factors for TOAST-Lite."""
        self.configs[adapter] = config
        for maps, identity in ((self.toast_to_state, nn.init.eye_), (self.toast_to_signal, nn.init.zeros_)):
            linear = nn.Linear(self.width, self.width, bias=False, **self._fresh)
            if config.init == "official":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            else:
                identity(linear.weight)
            maps[adapter] = _with_lora(linear, adapter, config) if config.is_lite else linear

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the feedback maps, `(width, width)`, and their LoRA factors."""
        for group, maps in (("to_state", self.toast_to_state), ("to_signal", self.toast_to_signal)):
            for name, parameter in maps[adapter].named_parameters():
                yield ("lora" if "lora_" in name else group), parameter

    def feed_back(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the state of the block above, `(batch, tokens, width)`; returns this block's and its signal."""
        assert self.adapter is not None
        state = self.toast_to_state[self.adapter](state)
        return state, self.toast_to_signal[self.adapter](state)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the projection; in a pass that holds a signal for this block, on `x + s` for the values."""
        call = current_pass()
        if call is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        call.enter(self)
        signal = call.signals.get(self)
        if signal is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        return self.layout.steer(self.base_layer, x, signal, self.config.value_bias == "twice")


def _with_lora(linear: nn.Linear, adapter: str, config: ToastConfig) -> LoraLinear:
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)  # type: ignore[arg-type]
    return LoraLinear(linear, adapter, lora, r=config.lora_rank, lora_alpha=config.lora_alpha)  # type: ignore[arg-type]


def make_selector(norm: nn.Module, projection: nn.Module, width: int) -> ToastSelector:
    """Wraps a norm, which may have no weights of its own: device and type come from a value projection."""
    return ToastSelector(norm, width, *fresh_weight_like(projection))


def make_value(projection: nn.Module, width: int, layout: Layout) -> ToastValue:
    """Wraps a value projection."""
    return ToastValue(projection, width, *fresh_weight_like(projection), layout)

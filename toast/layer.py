"""What the two adapter layers of TOAST have in common.

All parameters live in these layers, keyed by adapter name, as PEFT expects of a `BaseTunerLayer`: the
selector around the final norm (`toast.selector`), a value layer around each value projection (`toast.value`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from toast.config import ToastConfig
from toast.fusion import Fusion

#: The layers of all models that are alive: they say whether a configuration is in use.
LIVE: weakref.WeakSet[ToastLayer] = weakref.WeakSet()


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
        self.fusions: dict[str, Fusion] = {}  # one for all layers of a model
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        LIVE.add(self)

    @property
    def in_features(self) -> int:
        """Channels of what comes in, as other code asks of a tuner layer."""
        return self.width

    @property
    def out_features(self) -> int:
        """Channels of what goes out."""
        return self.width

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that acts now: None if disabled, deleted, or not of this layer."""
        if self.disable_adapters:
            return None
        active: Any = self.active_adapters
        return next((name for name in active if name in self.configs), None)

    @property
    def may_be_offloaded(self) -> bool:
        """Whether Accelerate may keep parameters elsewhere: it hooks the modules that hold some."""
        base: nn.Module = self.base_layer
        return "_hf_hook" in base.__dict__ or not base._parameters

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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, fusion in self.fusions.items():
            containers: tuple[str, ...] = self.adapter_layer_names  # type: ignore[assignment]
            marks = [f"{prefix}{container}.{name}" for container in containers]
            if any(key.startswith(mark) for key in state_dict for mark in marks):
                fusion.replaced = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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


CANNOT_MERGE = (
    "TOAST cannot be merged into the weights: its signal depends on a first pass over each input. "
    "Keep the adapter (save_pretrained), or remove it with unload()."
)

"""A wrapped model as its stand-ins see it: its parts, its adapter layers, and what runs a call of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from accelerate.hooks import remove_hook_from_module
from torch import nn

from toast.adapter import Adapter, FeedbackMaps
from toast.compiled import COMPILED
from toast.families.anatomy import Anatomy
from toast.fusion import FUSED
from toast.saving.names import is_of_adapter
from toast.selector import ToastSelector
from toast.thread_state import given_embedding, held_adapter
from toast.value import ToastValue


class WrappedModel(ABC):
    """The parts of one wrapped model that take part in the two passes; `toast.steering` says how they run.

    Args:
        model: The model that was wrapped, which holds the trunk.
        anatomy: Where its parts are.
        selector: The layer around its final norm.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, selector: ToastSelector) -> None:
        self.model = model
        self.trunk = anatomy.trunk
        self.family = anatomy.family
        self.block_names = anatomy.blocks
        self.value_paths = [unit.path for unit in anatomy.units]
        self._block_parts = [name.split(".") for name in self.block_names]
        self._holder_parts = [path.split(".")[:-1] for path in self.value_paths]
        self.units_of = [
            [u.number for u in anatomy.units if u.block == i] for i in range(len(anatomy.blocks))
        ]
        self.selector = selector
        self.methods: dict[str, Any] = {}
        self._found: list[tuple[ToastValue, nn.Module, str]] | None = None
        self._found_in: list[nn.Module] = []  # what held the value projections then

    @abstractmethod
    def forward(self, method: Any, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a method of the trunk in two passes and returns the second's output."""

    @abstractmethod
    def continues_prompt(
        self, method: Any, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call continues a text whose prompt alone is steered, and so runs once."""

    @abstractmethod
    def plain(self, name: str) -> Callable[..., Any]:
        """Returns a method of the trunk without steering."""

    @abstractmethod
    def holding_adapter(self, generates: bool = False) -> AbstractContextManager[Adapter | None]:
        """Takes the active adapter for all calls of the model within, unless that is done already."""

    @abstractmethod
    def holding(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """Makes the calls of the model use an adapter that was taken, or none, with its heads."""

    @abstractmethod
    def blocks_run_once(self, method: Any, adapter: Adapter, inputs: dict[str, Any]) -> int:
        """Returns how many of the lowest blocks give the same in both passes and need not run again."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of the call that runs; outside of calls, the active one. None for the plain model."""
        held = held_adapter(self)
        if held is not None:
            return held.adapter
        name = self.selector.adapter
        if name is None:
            return None
        adapter, given = self.adapter_named(name), given_embedding(self)
        if given is None:
            return adapter
        return dataclasses.replace(adapter, task_embedding=given.to(adapter.task_embedding), attends=True)

    def adapter_named(self, name: str) -> Adapter:
        """Returns the parts of an adapter, active or not."""
        return _take(name, self.selector, [layer for layer, _, _ in self.places])

    @property
    def values(self) -> list[ToastValue]:
        """The value projections that the active adapter steers, bottom block first; of any, if none is."""
        adapter = self.selector.adapter
        return [layer for layer, _, _ in self.places if adapter is None or adapter in layer.configs]

    @property
    def places(self) -> list[tuple[ToastValue, nn.Module, str]]:
        """The value layers of all adapters, with the module and the name under which each is held."""
        if self._found is None:
            self._found_in = self.holders
            self._found = [place for place in map(self._find, self.value_paths) if place is not None]
            for layer, _, _ in self._found:
                layer.fusions = self.selector.fusions
        return self._found

    def refresh(self) -> None:
        """Looks for the layers anew; to be called when an adapter was added."""
        self._found = None

    def follow(self) -> None:
        """Looks for the layers anew if a block was put in another's place, such as a copy of it."""
        if self._found is not None and self._found_in != self.holders:
            self.refresh()

    def _find(self, path: str) -> tuple[ToastValue, nn.Module, str] | None:
        holder_path, _, name = path.rpartition(".")
        holder = self.trunk.get_submodule(holder_path)
        layer: Any = holder.get_submodule(name)
        while not isinstance(layer, ToastValue):
            inner = layer._modules.get(COMPILED, getattr(layer, "base_layer", None))
            if inner is None:
                break
            layer = inner  # it is compiled by itself, or an adapter of another method stands around it
        return (layer, holder, name) if isinstance(layer, ToastValue) else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, bottom first."""
        return [_child(self.trunk, parts) for parts in self._block_parts]

    @property
    def holders(self) -> list[nn.Module]:
        """What holds each value projection, such as the attention."""
        return [_child(self.trunk, parts) for parts in self._holder_parts]

    def last_read(self, adapter: Adapter) -> int:
        """Returns the block whose output the selector reads."""
        last = adapter.config.select_from
        return len(self.block_names) - 1 if last is None else int(last)

    def fetch_parameters(self, needs_gradients: bool) -> None:
        """Takes back TOAST's own parameters, which Accelerate offloads if a wrapped model is dispatched.

        Its hooks would fetch them anew for every call, as other parameters than an optimiser holds.

        Args:
            needs_gradients: Whether the call needs the gradients of those that are trained.

        Raises:
            ValueError: If one that the call needs the gradient of was offloaded.
        """
        layers = (self.selector, *(layer for layer, _, _ in self.places))
        if not any(layer.may_be_offloaded for layer in layers):
            return
        for layer in layers:
            for name, module in layer.named_modules():
                if not is_of_adapter(name) or not hasattr(module, "_hf_hook"):
                    continue
                offloaded = [p for p in module.parameters(recurse=False) if p.is_meta]
                if offloaded and needs_gradients and any(p.requires_grad for p in offloaded):
                    raise ValueError(OFFLOADED)
                if offloaded:
                    remove_hook_from_module(module)


def _child(module: nn.Module, parts: list[str]) -> nn.Module:
    """Returns `module.get_submodule(".".join(parts))`, at a tenth of the time, as every call needs it."""
    found: nn.Module | None = module
    for part in parts:
        found = None if found is None else found._modules.get(part)
    if found is None:  # a compiled module, which passes names on; or it is not there, which this says
        return module.get_submodule(".".join(parts))
    return found


OFFLOADED = (
    "parameters that are trained were offloaded when the wrapped model was dispatched; an optimiser would "
    "hold parameters that get no gradient. Dispatch the model before toast.wrap, or, before the optimiser "
    "is made, call it once under torch.no_grad(), which takes them back."
)


def _take(name: str, selector: ToastSelector, layers: list[ToastValue]) -> Adapter:
    """Returns the parts of an adapter.

    Args:
        name: Its name.
        selector: The selector.
        layers: The value layers, bottom block first. Those that the adapter does not steer are left out.
    """
    maps = [
        FeedbackMaps(layer, layer.unit, layer.tokens, layer.toast_to_state[name], layer.toast_to_signal[name])
        for layer in layers
        if name in layer.configs
    ]
    return Adapter(
        name,
        selector.configs[name],
        selector.toast_task_embedding[name],
        selector.toast_channel_transform[name],
        maps,
        selector._buffers.get(f"{FUSED}{name}"),
        selector.fusions.get(name),
    )

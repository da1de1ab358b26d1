"""The five steps of TOAST around a trunk: first pass, selection, feedback, second pass; the head follows.

`Steering` belongs to one wrapped model. Its `SteeredMethod`s stand in for the methods that run the trunk, so
that every way to call the model (`model(x)`, `generate`, `forward_features`) is steered alike.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from toast.adapter import Adapter, take
from toast.calls.blocks import REPLACED, Blocks, BoundBlock, KnownBlock, with_lists
from toast.calls.entrances import ENTRANCES, HeldHead, attach_entrances, hold_heads
from toast.calls.hooks import BlockHook
from toast.calls.preconditions import check_call, refuse_trained_below
from toast.calls.recomputing import Carrying, carry_passes, tame_input_hooks, untame_input_hooks
from toast.calls.stand_ins import StandIn
from toast.compiled import COMPILED, is_compiled
from toast.families.anatomy import Anatomy
from toast.feedback import feed_back
from toast.generation.caching import cache_name, pass_caches, under_name, wants_all_blocks, without_cache
from toast.generation.continuous_batching import attach_batching
from toast.passes import (
    Pass,
    collected_passes,
    current_observer,
    current_pass,
    held_adapter,
    holding,
    replayed_output,
    running,
    stored_first_pass,
)
from toast.saving.names import as_written
from toast.selector import ToastSelector
from toast.value import ToastValue


class Steering:
    """Knows the parts of one wrapped model that take part in the two passes.

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
        self.units_of = [
            [u.number for u in anatomy.units if u.block == i] for i in range(len(anatomy.blocks))
        ]
        self.selector = selector
        self.hooks: list[BlockHook] = []
        self.methods: dict[str, SteeredMethod] = {}
        self.entrances: list[StandIn] = []
        self._found: list[tuple[ToastValue, nn.Module, str]] | None = None
        self.heads: list[HeldHead] | None = None  # found when they are needed: PEFT adds them late

    def forward(
        self, method: SteeredMethod, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a method of the trunk in two passes and returns the second's output.

        Equations 1 to 4 of arXiv 2305.15542 in the order in which they are computed.
        """
        check_call(self, adapter)
        observer = current_observer(self)
        checkpointing = torch.is_grad_enabled() and carry_passes(self)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tame_input_hooks(self)
        stored, collected = stored_first_pass(self), collected_passes(self)
        inputs = method.named(args, kwargs)
        if stored is not None or collected is not None:
            inputs = without_cache(method, inputs)
        once = self.blocks_run_once(method, adapter, inputs)
        caches = pass_caches(self, adapter, inputs, once)

        # 1. First pass: frozen, so it leaves no graph, unless something that it is given or uses is trained.
        first = Pass(self, 1, adapter, reads=self.selector, observer=observer, once=once)
        first_output = None
        if stored is not None:
            stored.fill(first, inputs)
            refuse_trained_below(self)
        else:
            first_output = self.first_pass(first, caches.first, checkpointing)
        if collected is not None:
            first.inputs = inputs
            collected.append(first)
            return first_output

        # 2. Selection: tokens that resemble the task embedding, then channels.
        assert first.features is not None
        if observer is None or not observer.replaces_signals:
            self.selector.start_from(adapter, *first.features)
        selection = self.selector.select(adapter, *first.features)

        # 3. Feedback: from the top block to the bottom one, all linear.
        signals = feed_back(adapter, selection)

        if observer is not None:
            observer.on_output(1, first_output)
            observer.on_selection(selection)
            signals = observer.on_signals(signals)

        # 4. Second pass: every block's values are those of x + s. What called us runs the head on the output.
        second = Pass(self, 2, adapter, signals, observer=observer, once=once, known=first.known)
        output = caches.hand_back(self.second_pass(second, method, caches.second, checkpointing))
        if observer is not None:
            observer.on_output(2, output)
        return output

    @contextmanager
    def holding_adapter(self, generates: bool = False) -> Iterator[Adapter | None]:
        """Takes the active adapter for all calls of the model within, unless that is done already.

        Args:
            generates: Whether these are of `generate`, which needs no gradient, whatever the mode is here.
        """
        if held_adapter(self) is not None:
            yield self.adapter
            return
        if self.selector.adapter is not None:
            self.fetch_parameters(needs_gradients=torch.is_grad_enabled() and not generates)
        adapter = self.adapter
        if adapter is not None:
            adapter.refuse_stale_fusion()
        with self.holding(adapter):
            yield adapter

    def holding(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """Makes the calls of the model use an adapter that was taken, or none, with its heads."""
        if self.heads is None and not torch.compiler.is_compiling():
            self.heads = hold_heads(self)
        return holding(self, adapter, [head.chosen(adapter) for head in self.heads or ()])

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of the call that runs; outside of calls, the active one. None for the plain model."""
        held = held_adapter(self)
        if held is not None:
            return held.adapter
        return take(self.selector, [layer for layer, _, _ in self.places])

    @property
    def values(self) -> list[ToastValue]:
        """The value projections that the active adapter steers, bottom block first; of any, if none is."""
        adapter = self.selector.adapter
        return [layer for layer, _, _ in self.places if adapter is None or adapter in layer.configs]

    @property
    def places(self) -> list[tuple[ToastValue, nn.Module, str]]:
        """The value layers of all adapters, with the module and the name under which each is held."""
        if self._found is None:
            self._found = [place for place in map(self._find, self.value_paths) if place is not None]
            for layer, _, _ in self._found:
                layer.fusions = self.selector.fusions
        return self._found

    def refresh(self) -> None:
        """Looks for the layers anew; to be called when an adapter was added."""
        self._found = self.heads = None

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

    def blocks_run_once(self, method: SteeredMethod, adapter: Adapter, inputs: dict[str, Any]) -> int:
        """Returns how many of the lowest blocks give the same in both passes and need not run again.

        They do run again for who wants to see all blocks, and where a device hook runs the trunk.
        """
        once = min(adapter.config.steer_from, self.last_read(adapter) + 1)
        if method.before is not None or method.name != self.family.methods[0]:
            return 0
        return 0 if once and wants_all_blocks(self, adapter, method, inputs) else once

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, bottom first."""
        return [self.trunk.get_submodule(name) for name in self.block_names]

    def last_read(self, adapter: Adapter) -> int:
        """Returns the block whose output the selector reads."""
        last = adapter.config.select_from
        return len(self.block_names) - 1 if last is None else last

    def first_pass(self, this: Pass, inputs: dict[str, Any], checkpointing: bool) -> Any:
        """Runs the trunk up to the block that the selector reads, through the final norm."""
        with running(this):
            output = self.plain(self.family.methods[0], self._lists(this, checkpointing))(**inputs)
        assert this.features is not None
        if torch.is_autocast_enabled(next(x for x in this.features if x is not None).device.type):
            # One cast weight for both passes would add their gradients in half precision.
            torch.clear_autocast_cache()
        return output

    def second_pass(
        self, this: Pass, method: SteeredMethod, inputs: dict[str, Any], checkpointing: bool
    ) -> Any:
        """Runs the trunk with the signals of the call, also when checkpointing recomputes a block."""
        with running(this):
            return self.plain(method.name, self._lists(this, checkpointing))(**inputs)

    def _lists(self, this: Pass, checkpointing: bool) -> dict[str, Blocks] | None:
        """Returns the lists of blocks of one pass; None if the trunk's own serve.

        Where the trunk checkpoints its blocks they are bound to the pass; the first pass ends at the block
        that the selector reads; the second knows what the blocks below the steered ones give.
        """
        assert this.adapter is not None
        count = len(self.block_names)
        last = self.last_read(this.adapter) if this.number == 1 else count - 1
        known = this.once if this.number == 2 else 0
        blocks = self.blocks
        this.bound = checkpointing or self._hooks_act(this) or self._are_compiled(blocks)
        if not this.bound and last == count - 1 and not known:
            return None
        lists: dict[str, Blocks] = {}
        for index, (name, block) in enumerate(zip(self.block_names, blocks, strict=True)):
            if index > last:
                break
            stands: Any = block
            if index < known:
                stands = KnownBlock(block, this.known)
            elif this.bound:
                stands = BoundBlock(block, this, self.hooks[index])
            lists.setdefault(as_written(name).rpartition(".")[0], Blocks()).append(stands)
        return lists

    def _hooks_act(self, this: Pass) -> bool:
        """Whether hooks at the blocks have a part in a pass, for which hooks of others are to come first."""
        reads = this.reads is not None and self.family.reads != "norm"
        acts = reads or this.once > 0 or this.wants_states or self.family.tokens == "windows"
        return acts and not any(method.before is not None for method in self.methods.values())

    def _are_compiled(self, blocks: list[nn.Module]) -> bool:
        """Whether blocks, or what holds their value projections, are compiled one by one."""
        if torch.compiler.is_compiling() or any(
            method.before is not None for method in self.methods.values()
        ):
            return False
        if "torch._dynamo" not in sys.modules:
            return False
        around = [self.trunk.get_submodule(path.rpartition(".")[0]) for path in self.value_paths]
        return any(is_compiled(module) for module in (*blocks, *around))

    def plain(self, name: str, lists: dict[str, Blocks] | None = None) -> Callable[..., Any]:
        """Returns a method of the trunk without steering, over other lists of blocks if they are given."""
        if lists is None:
            return self.methods[name].before or functools.partial(getattr(type(self.trunk), name), self.trunk)
        if self.methods[name].before is not None:
            raise ValueError(REPLACED.format(f"{type(self.trunk).__name__}.{name}"))
        view = with_lists(self.trunk, lists, hidden=(*self.family.methods, *ENTRANCES))
        return functools.partial(getattr(type(self.trunk), name), view)

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
                if not name.startswith("toast_") or not hasattr(module, "_hf_hook"):
                    continue
                offloaded = [p for p in module.parameters(recurse=False) if p.is_meta]
                if offloaded and needs_gradients and any(p.requires_grad for p in offloaded):
                    raise ValueError(OFFLOADED)
                if offloaded:
                    remove_hook_from_module(module)

    def attach(self) -> None:
        """Puts steered methods in the place of the trunk's, and hooks at its blocks."""
        self.hooks = [
            BlockHook(self, block, index, self.units_of[index]) for index, block in enumerate(self.blocks)
        ]
        for name in self.family.methods:
            self.methods[name] = SteeredMethod(self, name)
            self.methods[name].attach()
        self.entrances = attach_entrances(self) + attach_batching(self)

    def detach(self) -> None:
        """Gives the model its own methods back, and the blocks their own checkpointing functions."""
        for stand_in in (*self.methods.values(), *self.entrances, *(self.heads or ())):
            stand_in.detach()
        for hook in self.hooks:
            hook.remove()
        untame_input_hooks(self)
        for block in self.blocks:
            carrying = block.__dict__.get("_gradient_checkpointing_func")
            if isinstance(carrying, Carrying):
                block._gradient_checkpointing_func = carrying.checkpoint  # type: ignore[assignment]


class SteeredMethod(StandIn):
    """Stands on the trunk in the place of one of its methods and runs it in two passes.

    Args:
        steering: The wrapped model's parts.
        name: Name of the method.
    """

    def __init__(self, steering: Steering, name: str) -> None:
        super().__init__(steering, steering.trunk, name)
        self.cache_name = cache_name(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method, steered if an adapter is active."""
        steering = self.steering
        this = current_pass()
        if this is not None and this.owner is steering:
            return steering.plain(self.name)(*args, **kwargs)  # the trunk's own methods call each other
        with steering.holding_adapter() as adapter:
            if adapter is None:
                with running(Pass(steering, 0)):
                    return steering.plain(self.name)(*args, **kwargs)
            replayed = replayed_output(steering)
            return steering.forward(self, adapter, args, kwargs) if replayed is None else replayed

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns positional and keyword arguments by name; the cache by the name that the method knows."""
        names = [p.name for p in self.__signature__.parameters.values() if p.kind is not p.VAR_KEYWORD]
        if len(args) > len(names):
            raise TypeError(f"{self.name}() takes at most {len(names)} arguments; got {len(args)}.")
        return under_name(self.cache_name, dict(zip(names[: len(args)], args, strict=True)) | kwargs)


OFFLOADED = (
    "parameters that are trained were offloaded when the wrapped model was dispatched; an optimiser would "
    "hold parameters that get no gradient. Dispatch the model before toast.wrap, or, before the optimiser "
    "is made, call it once under torch.no_grad(), which takes them back."
)

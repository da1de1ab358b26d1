"""The five steps of TOAST around a trunk: first pass, selection, feedback, second pass; the head follows.

`Steering` belongs to one wrapped model. Its `SteeredMethod`s stand in for the methods that run the trunk, so
that every way to call the model (`model(x)`, `generate`, `forward_features`) is steered alike.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from toast.adapter import Adapter
from toast.calls.blocks import REPLACED, Blocks, BoundBlock, KnownBlock, with_lists
from toast.calls.entrances import ENTRANCES, HeldHead, attach_entrances, hold_heads
from toast.calls.hooks import BlockHook
from toast.calls.preconditions import check_call, refuse_trained_below
from toast.calls.recomputing import Carrying, carry_passes, tame_input_hooks, untame_input_hooks
from toast.calls.stand_ins import StandIn, SteeredMethod
from toast.calls.wrapped import WrappedModel
from toast.compiled import is_compiled
from toast.families.anatomy import Anatomy
from toast.feedback import feed_back
from toast.generation.caching import continues_prompt, pass_caches, wants_all_blocks, without_cache
from toast.generation.continuous_batching import attach_batching
from toast.mixed import BASE, MixedAdapter, mixed
from toast.passes import Pass
from toast.saving.names import as_written
from toast.selector import ToastSelector
from toast.thread_state import (
    collected_passes,
    current_observer,
    given_embedding,
    held_adapter,
    holding,
    running,
    stored_first_pass,
)


class Steering(WrappedModel):
    """Runs the calls of one wrapped model in two passes.

    Args:
        model: The model that was wrapped, which holds the trunk.
        anatomy: Where its parts are.
        selector: The layer around its final norm.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, selector: ToastSelector) -> None:
        super().__init__(model, anatomy, selector)
        self.hooks: list[BlockHook] = []
        self.entrances: list[StandIn] = []
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

        assert first.features is not None
        if isinstance(adapter, MixedAdapter):  # steps 2 and 3, for each adapter's rows of the batch
            if observer is not None:
                raise ValueError("adapter_names: only calls of one adapter are observed. Call once for each.")
            signals = adapter.signals(self.selector, *first.features)
        else:
            # 2. Selection: tokens that resemble the task embedding, then channels.
            if not adapter.attends and (observer is None or not observer.replaces_signals):
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

    def continues_prompt(
        self, method: SteeredMethod, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call continues a text whose prompt alone is steered, and so runs once."""
        if adapter.config.steer_tokens == "all":
            return False
        return continues_prompt(method, adapter, method.named(args, kwargs))

    def refresh(self) -> None:
        """Looks for the layers and the heads anew; to be called when an adapter was added."""
        super().refresh()
        self.heads = None

    @contextmanager
    def holding_adapter(self, generates: bool = False) -> Iterator[Adapter | None]:
        """Takes the active adapter for all calls of the model within, unless that is done already.

        Args:
            generates: Whether these are of `generate`, which needs no gradient, whatever the mode is here.
        """
        if held_adapter(self) is not None:
            yield self.adapter
            return
        if not torch.compiler.is_compiling():
            self.follow()
        if self.selector.adapter is not None:
            self.fetch_parameters(needs_gradients=torch.is_grad_enabled() and not generates)
        adapter = self.adapter
        if adapter is not None:
            adapter.refuse_stale_fusion()
            if generates and adapter.attends:
                adapter = dataclasses.replace(adapter, generates=True)
        with self.holding(adapter):
            yield adapter

    def holding_each(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Makes the calls of the model use an adapter for each sample.

        Args:
            names: The adapter of each sample; `__base__` for the frozen model.

        Raises:
            ValueError: If one is not there, or they cannot share their passes.
        """
        return self.holding(mixed(names, self.taken([name for name in names if name != BASE])))

    def taken(self, names: Sequence[str]) -> dict[str, Adapter]:
        """Returns adapters by their names, active or not, ready for a call.

        Raises:
            ValueError: If one is not there, or its fused matrix is stale.
        """
        self.fetch_parameters(needs_gradients=torch.is_grad_enabled())
        if given_embedding(self) is not None:
            raise ValueError("several adapters have embeddings of their own: leave toast.attend_to first.")
        known = self.selector.configs
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"adapter {missing[0]!r} is none of the model's: {', '.join(known)}.")
        adapters = {name: self.adapter_named(name) for name in names}
        for adapter in adapters.values():
            adapter.refuse_stale_fusion()
        return adapters

    def holding(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """Makes the calls of the model use an adapter that was taken, or none, with its heads."""
        if self.heads is None and not torch.compiler.is_compiling():
            self.heads = hold_heads(self)
        return holding(self, adapter, [head.chosen(adapter) for head in self.heads or ()])

    def blocks_run_once(self, method: SteeredMethod, adapter: Adapter, inputs: dict[str, Any]) -> int:
        """Returns how many of the lowest blocks give the same in both passes and need not run again.

        They do run again for who wants to see all blocks, and where a device hook runs the trunk.
        """
        once = min(int(adapter.config.steer_from), self.last_read(adapter) + 1)
        if method.before is not None or method.name != self.family.methods[0]:
            return 0
        return 0 if once and wants_all_blocks(self, adapter, method, inputs) else once

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
        return acts and not self._is_replaced

    @property
    def _is_replaced(self) -> bool:
        """Whether a method of the trunk was replaced before, so that the trunk runs over its own blocks."""
        return any(method.before is not None for method in self.methods.values())

    def _are_compiled(self, blocks: list[nn.Module]) -> bool:
        """Whether blocks, or what holds their value projections, are compiled one by one."""
        if torch.compiler.is_compiling() or self._is_replaced:
            return False
        if "torch._dynamo" not in sys.modules:
            return False
        return any(is_compiled(module) for module in (*blocks, *self.holders))

    def plain(self, name: str, lists: dict[str, Blocks] | None = None) -> Callable[..., Any]:
        """Returns a method of the trunk without steering, over other lists of blocks if they are given."""
        if lists is None:
            return self.methods[name].before or functools.partial(getattr(type(self.trunk), name), self.trunk)
        if self.methods[name].before is not None:
            raise ValueError(REPLACED.format(f"{type(self.trunk).__name__}.{name}"))
        view = with_lists(self.trunk, lists, hidden=(*self.family.methods, *ENTRANCES))
        return functools.partial(getattr(type(self.trunk), name), view)

    def attach(self) -> None:
        """Puts steered methods in the place of the trunk's, and what stands at its blocks."""
        for name in self.family.methods:
            self.methods[name] = SteeredMethod(self, name)
            self.methods[name].attach()
        self.hooks = [BlockHook(self, index, units) for index, units in enumerate(self.units_of)]
        if self._is_replaced:
            for hook, block in zip(self.hooks, self.blocks, strict=True):
                hook.register(block)
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


def find_steering(model: nn.Module) -> Steering | None:
    """Returns what runs the calls of a wrapped model; None if it is not wrapped."""
    for module in model.modules():
        for attribute in module.__dict__.values():
            if isinstance(attribute, SteeredMethod) and isinstance(attribute.steering, Steering):
                return attribute.steering
    return None


def steering_of(model: nn.Module, what: str) -> tuple[Steering, Adapter]:
    """Returns the same of a model that has to be wrapped, and its active adapter.

    Args:
        model: The model.
        what: What needs it, for the message.

    Raises:
        ValueError: If it is not.
    """
    steering = find_steering(model)
    adapter = None if steering is None else steering.adapter
    if steering is None or adapter is None:
        raise ValueError(f"{what} needs a model with an active TOAST adapter; wrap it with toast.wrap first.")
    return steering, adapter

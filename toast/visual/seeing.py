"""What the attentions and blocks of one call compute, in either pass, of steered and of plain models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from toast.families.anatomy import find_anatomy, unwrapped
from toast.families.table import Family
from toast.families.tokens import channels_last
from toast.passes import Pass
from toast.steering import Steering, find_steering
from toast.thread_state import current_pass, running
from toast.tracing import AttentionMode, SeenAttention, Trace, trace


class LastAttention(AttentionMode):
    """Sees the attention that a model computes last: in one call, that of its last block."""

    def __init__(self) -> None:
        super().__init__(self._replace)

    def _replace(self, attention: SeenAttention) -> None:
        self._last = attention

    @property
    def attention(self) -> Tensor:
        """The attention, `(batch, heads, tokens, tokens)`."""
        return self._last()


@dataclass(frozen=True)
class Parts:
    """Where to look in a model.

    Args:
        trunk: The part that has the blocks.
        family: Its row.
        blocks: The blocks, bottom first.
        values: What makes the values of each attention, unwrapped, bottom first. Most blocks have one.
        attentions: The module around each.
        block_of: The block of each.
        steering: The parts that take part in two passes, if the model is wrapped and its adapter is active.
    """

    trunk: nn.Module
    family: Family
    blocks: list[nn.Module]
    values: list[nn.Module]
    attentions: list[nn.Module]
    block_of: list[int]
    steering: Steering | None


def find_parts(model: nn.Module) -> Parts:
    """Finds where to look in a vision model: plain, with another adapter, or wrapped.

    Raises:
        ValueError: If no family fits, or the model is one of language.
    """
    steering = find_steering(model)
    if steering is not None:
        trunk, family, names = steering.trunk, steering.family, steering.block_names
        paths = steering.value_paths
    else:
        anatomy = find_anatomy(model)
        trunk, family, names = anatomy.trunk, anatomy.family, anatomy.blocks
        paths = [unit.path for unit in anatomy.units]
    if family.kind != "vision":
        raise ValueError(
            f"maps over a picture need a vision model; {type(trunk).__name__} (family {family.name}) is one "
            "of language."
        )
    active = steering is not None and steering.adapter is not None
    return Parts(
        trunk=trunk,
        family=family,
        blocks=[trunk.get_submodule(name) for name in names],
        values=[unwrapped(trunk.get_submodule(path)) for path in paths],
        attentions=[trunk.get_submodule(path.rpartition(".")[0]) for path in paths],
        block_of=[next((i for i, at in enumerate(names) if path.startswith(f"{at}.")), 0) for path in paths],
        steering=steering if active else None,
    )


@dataclass
class PassRecord:
    """What was seen of one pass.

    Args:
        attention: By place of the attention, counted from the bottom.
        entering: By block, what entered it, in the family's order of tokens; if states were wanted.
        leaving: By block, what left it, in the same; if states were wanted.
        shapes: By block, the shape of what entered it, channels last.
        output: What the model returned.
        call: The pass, if it ran by itself; blocks that its backward recomputes have to run in it.
    """

    attention: dict[int, SeenAttention] = field(default_factory=dict)
    entering: dict[int, Tensor] = field(default_factory=dict)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    output: Any = None
    call: Pass | None = None

    def over(self, first: PassRecord) -> PassRecord:
        """Returns this pass with what ran in the first pass only, because both would have given the same."""
        return PassRecord(
            first.attention | self.attention,
            first.entering | self.entering,
            first.leaving | self.leaving,
            first.shapes | self.shapes,
            self.output,
        )


@dataclass(frozen=True)
class CallRecord:
    """What was seen of a call.

    Args:
        output: The pass that made the output.
        frozen: The frozen model's; None of a plain model.
        trace: The rest of a steered call.
    """

    output: PassRecord
    frozen: PassRecord | None
    trace: Trace | None


def record_call(
    model: nn.Module,
    parts: Parts,
    pixels: Tensor,
    inputs: dict[str, Any],
    *,
    wanted: set[int],
    states: bool = False,
    whole: bool = False,
) -> CallRecord:
    """Calls a model once and records both passes.

    The frozen model of a steered one is its first pass; where that ended below what is wanted, the frozen
    model runs once more to its top, in this thread only. That of another PEFT adapter is the model without
    it, which is switched off for a moment, in all threads.

    Args:
        model: The model.
        parts: Its parts.
        pixels: What it is given.
        inputs: Further inputs.
        wanted: The attentions, counted from the bottom.
        states: Whether to keep what enters and leaves the blocks.
        whole: Whether the frozen model has to run with its head, under the gradient mode of the caller.
    """
    steering = parts.steering
    if steering is not None:
        with _watching(parts, wanted, states) as seen:
            traced = trace(model, pixels, **inputs)
        output = seen[2].over(seen[1])
        output.output = traced.output
        frozen = seen[1]
        frozen.output = traced.first_output
        missing = wanted - frozen.attention.keys() or len(frozen.shapes) < len(parts.blocks)
        if whole or missing:
            call = Pass(steering, 1)
            with _watching(parts, wanted, states) as seen, running(call):
                frozen_output = model(pixels, **inputs)
            frozen = seen[1]
            frozen.output, frozen.call = frozen_output, call
        return CallRecord(output, frozen, traced)
    with _watching(parts, wanted, states) as seen:
        seen[2].output = model(pixels, **inputs)
    output = seen[2]
    if not isinstance(model, PeftModel) or not _is_active(model):
        return CallRecord(output, None, None)
    with _without_adapter(model), _watching(parts, wanted, states) as seen:
        seen[2].output = model(pixels, **inputs)
    return CallRecord(output, seen[2], None)


def _is_active(model: PeftModel) -> bool:
    status = model.get_model_status()
    return status.enabled is not False and bool(status.active_adapters)


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """Switches an adapter of PEFT off, and leaves as trainable what was: PEFT makes it all so."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, needed in trained:
            parameter.requires_grad_(needed)


@contextmanager
def _watching(parts: Parts, wanted: set[int], states: bool) -> Iterator[dict[int, PassRecord]]:
    """Watches the calls of a model in this thread; gives what was seen by pass, a plain model's being 2."""
    watcher = _Watcher(parts, wanted, states)
    handles = [
        handle
        for module, before, after in watcher.hooks()
        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )
    ]
    try:
        with AttentionMode(watcher.keep):
            yield watcher.passes
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Stands at the attentions and the blocks while somebody looks."""

    def __init__(self, parts: Parts, wanted: set[int], states: bool) -> None:
        self.parts = parts
        self.wanted = wanted
        self.states = states
        self.passes = {1: PassRecord(), 2: PassRecord()}
        self.inside: int | None = None
        self.thread = threading.get_ident()

    @property
    def seen(self) -> PassRecord | None:
        """What is seen of the pass that runs; None if another thread runs."""
        if threading.get_ident() != self.thread:
            return None
        this = current_pass()
        steered = this is not None and this.owner is self.parts.steering
        return self.passes[this.number if steered and this is not None else 2]

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None], Callable[..., None]]]:
        """Yields where to stand, with what is called before and after. Blocks first: one may hold itself."""
        for index, block in enumerate(self.parts.blocks):
            yield block, self._entering(index), self._leaving(index)
        for number in sorted(self.wanted):
            yield self.parts.attentions[number], self._starting(number), self._ending

    def _entering(self, index: int) -> Callable[..., None]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = self.seen
            if seen is None:
                return
            if index in seen.shapes:
                raise ValueError("one run of the trunk can be shown; this call ran the trunk more than once.")
            entering = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            seen.shapes[index] = tuple(channels_last(entering, self.parts.family.tokens).shape)
            if self.states:
                seen.entering[index] = entering

        return before

    def _leaving(self, index: int) -> Callable[..., None]:
        def after(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen = self.seen
            if seen is not None and self.states:
                seen.leaving[index] = out[0] if isinstance(out, tuple) else out

        return after

    def _starting(self, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.seen is not None:
                self.inside = number

        return before

    def _ending(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.seen is not None:
            self.inside = None

    def keep(self, attention: SeenAttention) -> None:
        """Keeps the attention of the module that runs."""
        if self.inside is None:
            return
        seen = self.seen
        assert seen is not None
        if self.inside in seen.attention:
            raise ValueError(
                f"{type(self.parts.attentions[self.inside]).__name__} weighs its values with more than one "
                "attention (differential attention), so there is no one map to show."
            )
        seen.attention[self.inside] = attention

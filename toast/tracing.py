"""`toast.trace`: both passes of one call as named tensors, attention maps included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toast.compiled import eagerly
from toast.families.anatomy import Unit
from toast.feedback import signals
from toast.passes import Observer
from toast.signals import Selection
from toast.steering import steering_of
from toast.thread_state import observing, replaying


@dataclass
class Trace:
    """What happened in the two passes of one call.

    Args:
        features: Features of the first pass that the selector read, `(batch, tokens, width)`.
        selection_weights: One weight a token, 0 to 1, `(batch, tokens)`.
        selected: Features after token and channel selection, `(batch, tokens, width)`.
        feed_back: Computes `signals`.
        first_output: What the model would have returned after the first pass.
        output: What the model returned.
        first_attention: By block, attention of the first pass, `(batch, heads, tokens, tokens)`; only of the
            blocks that it runs, which `select_from` may cut short.
        attention: By block, attention of the second pass.
        states: By block, what entered it and what entered the one above (of the last: what left it) in the
            second pass, each `(batch, tokens, width)`.
    """

    features: Tensor
    selection_weights: Tensor
    selected: Tensor
    feed_back: Callable[[], list[Tensor]] = field(repr=False)
    first_output: Any
    output: Any
    first_attention: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def signals(self) -> list[Tensor]:
        """Top-down signal of every block, bottom first, each `(batch, tokens, width)`.

        Computed when first asked for: the composed form of the feedback does without them.
        """
        return self.feed_back()


def trace(
    model: nn.Module,
    *inputs: Any,
    attention_blocks: Sequence[int] | Literal["all"] = (),
    block_states: bool = False,
    **kwargs: Any,
) -> Trace:
    """Calls a wrapped model once and returns both passes.

    Nothing is run again to look at it: these are the passes that made the output. Gradients are kept if they
    are enabled; the first pass has none.

    Args:
        model: A wrapped model with an active adapter.
        *inputs: Inputs of the model.
        attention_blocks: Blocks, counted from 0 (negative from the top), whose attention is wanted, or "all".
            The maps are softmax(q kᵀ · scale + mask) of the queries and keys that the model's own kernel got.
        block_states: Whether to keep what enters and leaves each block in the second pass.
        **kwargs: Further inputs of the model.

    Raises:
        ValueError: If the model is not wrapped, no adapter is active, a block is not there, or the model's
            attention kernel does not show its queries and keys.
    """
    steering, adapter = steering_of(model, "trace")
    count = len(steering.value_paths)
    steered = [maps.unit.number for maps in adapter.maps]
    wanted = steered if attention_blocks == "all" else [int(block) for block in attention_blocks]
    wrong = [block for block in wanted if not -count <= block < count or block % count not in steered]
    if wrong:
        raise ValueError(
            f"attention_blocks: the model has steered blocks {steered[0]} to {steered[-1]}; got {wrong}."
        )
    recorder = _Recorder({b % count for b in wanted}, block_states)
    sees_attention = AttentionMode(recorder.keep) if recorder.wanted else nullcontext()
    with steering.holding(adapter), eagerly(model):
        with observing(steering, recorder), sees_attention:
            output = model(*inputs, **kwargs)
        if recorder.outputs.keys() != {1, 2}:
            raise ValueError("the call did not run the steered trunk, so there is nothing to show.")
        with replaying(steering, recorder.outputs[1]):
            first_output = model(*inputs, **kwargs)
    read = adapter.config.select_from
    for number, seen in recorder.attention.items():
        for block in sorted(recorder.wanted - seen.keys()):
            if number == 2 or read is None or block <= read:
                raise ValueError(
                    f"no attention was seen in block {block}: the model's kernel does not expose queries and "
                    "keys. Load the model with attn_implementation='sdpa' or 'eager'."
                )
    selection = recorder.selection
    selected = selection.selected
    return Trace(
        features=selection.features,
        selection_weights=selection.weights,
        selected=selected,
        feed_back=partial(signals, adapter.maps, selected),
        first_output=first_output,
        output=output,
        first_attention=recorder.maps(1),
        attention=recorder.maps(2),
        states={i: (recorder.states[i], recorder.states[i + 1]) for i in steered if block_states},
    )


class _Recorder(Observer):
    """Keeps what the passes tell."""

    def __init__(self, wanted: set[int], wants_states: bool) -> None:
        self.wanted = wanted
        self.wants_states = wants_states
        self.attention: dict[int, dict[int, SeenAttention]] = {1: {}, 2: {}}
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Any] = {}
        self.selection: Selection
        self.expects: tuple[int, int] | None = None

    def on_block(self, number: int, unit: Unit) -> None:
        # Seen before: activation checkpointing recomputes this block.
        missing = unit.number in self.wanted and unit.number not in self.attention[number]
        self.expects = (number, unit.number) if missing else None

    def on_states(self, number: int, index: int, state: Tensor) -> None:
        if number == 2 and 2 not in self.outputs:  # else activation checkpointing recomputes the block
            self.states[index] = state

    def on_selection(self, selection: Selection) -> None:
        self.selection = selection

    def on_output(self, number: int, output: Any) -> None:
        if number in self.outputs:
            raise ValueError("trace shows one run of the trunk; this call ran the trunk more than once.")
        self.outputs[number] = output

    def keep(self, attention: SeenAttention) -> None:
        """Keeps the attention of the block that runs: the first after its value projection.

        Its map is computed after the call: within it, activation checkpointing would count what the map saves
        for backward, which a recomputation then misses.
        """
        if self.expects is not None:
            number, block = self.expects
            self.attention[number][block] = attention
            self.expects = None

    def maps(self, number: int) -> dict[int, Tensor]:
        """Returns the attention of a pass by block; the first pass has no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and number == 2):
            return {block: attention() for block, attention in sorted(self.attention[number].items())}


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """One attention of a call, `(batch, heads, queries, keys)`; computed when it is called.

    Args:
        compute: Computes the map.
        output: What has the graph of the call: the map itself, or what a fused kernel returned.
        value: The values that a fused kernel weighed, `(batch, heads, keys, channels)`; None if the map is
            `output`.
    """

    compute: Callable[[], Tensor] = field(repr=False)
    output: Tensor = field(repr=False)
    value: Tensor | None = field(default=None, repr=False)

    def __call__(self) -> Tensor:
        """Computes the map."""
        return self.compute()

    def gradient(self, of_output: Tensor) -> Tensor:
        """Returns the gradient with respect to the map, of a kernel that keeps the map to itself too.

        Of `O = A V` it is `dL/dA = dL/dO Vᵀ`; without dropout, which would lie between the two.

        Args:
            of_output: The gradient with respect to `output`.
        """
        if self.value is None:
            return of_output
        precision = torch.promote_types(self.value.dtype, torch.float32)
        value = self.value.detach().to(precision)
        value = value.repeat_interleave(of_output.shape[-3] // value.shape[-3], dim=-3)
        return of_output.to(precision) @ value.transpose(-2, -1)


class AttentionMode(TorchFunctionMode):
    """Sees attention as it is computed, in this thread only.

    An attention is a call of PyTorch's `scaled_dot_product_attention`, or a softmax over keys in an
    implementation by hand.

    Args:
        keep: Is given each attention when it is called.
    """

    def __init__(self, keep: Callable[[SeenAttention], None]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            value = kwargs["value"] if "value" in kwargs else args[2]
            self.keep(SeenAttention(partial(attention_map, *args, **kwargs), out, value))
        elif getattr(func, "__name__", "") == "softmax" and out.ndim == 4:
            self.keep(SeenAttention(lambda: out, out))
        return out


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns the attention that `scaled_dot_product_attention` applies, before dropout, in float32 or finer.

    Returns:
        `(batch, heads, queries, keys)`; rows sum to 1.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    precision = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(precision) @ key.to(precision).transpose(-2, -1)
        scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -math.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
        return scores.softmax(-1).nan_to_num(0.0)

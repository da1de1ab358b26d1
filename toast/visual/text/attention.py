"""One call of a steered language model over a text, and the attention of one block in both passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toast.compiled import eagerly
from toast.families.anatomy import Unit
from toast.passes import Observer
from toast.signals import Signal
from toast.steering import steering_of
from toast.thread_state import observing
from toast.tracing import AttentionMode, trace


@dataclass(frozen=True)
class Reading:
    """What was seen of the call.

    Args:
        selection_weights: `(tokens,)`.
        first_attention: `(heads, queries, keys)`.
        second_attention: `(heads, queries, keys)`.
        block: The block whose attention it is, from 0.
        first_pass_ends: The block after which the first pass ended, if that is below `block`. The first
            attention is then that of a further call without steering, which the first pass begins.
    """

    selection_weights: Tensor
    first_attention: Tensor
    second_attention: Tensor
    block: int
    first_pass_ends: int | None


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, block: int) -> Reading:
    """Calls a model once on a whole text; the passes that are seen are those that make its logits.

    Args:
        model: A wrapped causal language model with an active adapter.
        ids: Tokens of one text without padding, `(1, tokens)`.
        block: The block whose attention is wanted, negative from the top.

    Raises:
        ValueError: As `toast.trace` does.
    """
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    traced = trace(model, **call, attention_blocks=[block])
    ((block, second),) = traced.attention.items()
    ends = None
    if block in traced.first_attention:
        first = traced.first_attention[block]
    else:
        steering, adapter = steering_of(model, "look_at_text")
        ends = steering.last_read(adapter)
        first = _frozen_attention(model, block, call)
    return Reading(traced.selection_weights[0], first[0], second[0], block, ends)


def _frozen_attention(model: nn.Module, block: int, inputs: dict[str, Any]) -> Tensor:
    """Returns the attention of a block without steering, `(batch, heads, tokens, tokens)`."""
    steering, _ = steering_of(model, "look_at_text")
    watch = _Unsteered(block)
    with observing(steering, watch), AttentionMode(watch.keep), eagerly(model):
        model(**inputs)
    assert watch.attention is not None  # the trace of the same call has seen this block's
    return watch.attention


class _Unsteered(Observer):
    """Takes the signals from the second pass, which then is the frozen model; keeps a block's attention."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.runs = False
        self.attention: Tensor | None = None

    def on_signals(self, signals: dict[int, Signal]) -> dict[int, Signal]:
        return {}

    def on_block(self, number: int, unit: Unit) -> None:
        self.runs = number == 2 and unit.number == self.block

    def keep(self, attention: Callable[[], Tensor]) -> None:
        if self.runs:
            self.attention, self.runs = attention(), False

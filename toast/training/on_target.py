"""What counts on targets while a split is measured: of the forward pass that is made anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.passes import Observer
from toast.signals import Selection
from toast.thread_state import observing
from toast.visual import targets
from toast.visual.attention_maps import AttentionMaps
from toast.visual.grids import has_token_attention, sequence_grid
from toast.visual.patch_attention import fine, patch_attention
from toast.visual.seeing import LastAttention, find_parts


class SeenCall(Observer):
    """What was seen of a call.

    Args:
        last: Sees the attention of its last block.
    """

    def __init__(self, last: LastAttention) -> None:
        self.last = last
        self.weights: Tensor | None = None

    def on_selection(self, selection: Selection) -> None:
        """Keeps the selection weights, `(batch, tokens)`."""
        self.weights = selection.weights


class LastBlockWatcher:
    """Measures the attention of the last block, and the selection of a steered model, on samples' targets.

    The attention is the class token's over the patches, or the mean over all patches' where there is none;
    the mean over heads. Of an attentive probe it is the probe's own, the mean over its queries. What is
    measured, and of which samples, says `toast.visual.targets`.

    Args:
        model: The model that is measured.

    Raises:
        ValueError: If its attention is not over a grid of patches of the whole picture.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = find_parts(model)
        if not has_token_attention(self.parts) or self.parts.family.tokens != "sequence":
            raise ValueError(f"{type(self.parts.trunk).__name__} has no attention over all patches.")
        prompts = find_prompts(model)
        self.is_probe = find_probe(model) is not None
        self.behind = 0 if prompts is None else prompts.count

    @contextmanager
    def watching(self) -> Iterator[SeenCall]:
        """Sees the last attention, and what is selected, of the calls within it."""
        steering = self.parts.steering
        with LastAttention() as last:
            seen = SeenCall(last)
            with nullcontext() if steering is None else observing(steering, seen):
                yield seen

    def attention_maps(self, seen: SeenCall, size: tuple[int, int], output: Any = None) -> AttentionMaps:
        """Lays what was seen out over the picture.

        Args:
            seen: What saw the call.
            size: Height and width of the picture in pixels.
            output: What the model returned, if that is wanted.
        """
        attention = seen.last.attention
        patches = patch_attention(
            self.parts, attention.shape[-1], size, "probe" if self.is_probe else None, self.behind
        )
        maps, on_patches = patches.of_heads(attention)
        selection = None
        if seen.weights is not None:
            weights = fine(seen.weights)
            selection = sequence_grid(self.parts, weights.shape[1], size).lay_out(weights)
        last = len(self.parts.blocks) - 1
        return AttentionMaps(
            attention=maps,
            frozen=None,
            selection=selection,
            signals={},
            on_patches=on_patches,
            frozen_on_patches=None,
            output=output,
            frozen_output=None,
            size=size,
            block=last,
            blocks=last + 1,
            head="mean",
            query=patches.query,
            method="attention",
        )

    def measure(self, seen: SeenCall, target: Tensor) -> dict[str, Tensor]:
        """Measures a call; see `toast.visual.targets.measure`.

        Args:
            seen: What saw the call.
            target: Masks `(batch, height, width)`, 0 to 1; not a number where a sample has none.

        Returns:
            Name -> `(batch,)`.
        """
        maps = self.attention_maps(seen, (target.shape[1], target.shape[2]))
        return targets.measure(maps.attention, maps.selection, target, maps.size)

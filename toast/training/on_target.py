"""What counts on targets while a split is measured: of the forward pass that is made anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.passes import Observer
from toast.signals import Selection
from toast.thread_state import observing
from toast.visual import targets
from toast.visual.grids import Maps, has_class_token, has_token_attention, sequence_grid
from toast.visual.seeing import LastAttention, find_parts


class Seen(Observer):
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


class OnTarget:
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
        self.query = ""

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Sees the last attention, and what is selected, of the calls within it."""
        steering = self.parts.steering
        with LastAttention() as last:
            seen = Seen(last)
            with nullcontext() if steering is None else observing(steering, seen):
                yield seen

    def maps(self, seen: Seen, size: Sequence[int]) -> Maps:
        """Lays the attention that was seen out over the picture; each map sums to 1.

        Args:
            seen: What saw the call.
            size: Height and width of the picture in pixels.
        """
        attention = seen.last.attention.float().mean(1).cpu()
        tokens = attention.shape[-1] - self.behind  # VPT's prompts stand behind the patches
        attention = attention[:, :tokens, :tokens]
        grid = sequence_grid(self.parts, tokens, size)
        has_class = not self.is_probe and has_class_token(self.parts, grid)
        self.query = "probe" if self.is_probe else "class" if has_class else "mean"
        query = attention[:, grid.prefix :].mean(1) if self.query == "mean" else attention[:, 0]
        maps = grid.lay_out(query)
        return Maps(maps.values / maps.values.sum((1, 2), keepdim=True), maps.cell)

    def selection(self, seen: Seen, size: Sequence[int]) -> Maps | None:
        """Lays the selection weights that were seen out over the picture; None if nothing was selected.

        Args:
            seen: What saw the call.
            size: Height and width of the picture in pixels.
        """
        if seen.weights is None:
            return None
        weights = seen.weights.float().cpu()
        return sequence_grid(self.parts, weights.shape[1], size).lay_out(weights)

    def measure(self, seen: Seen, target: Tensor) -> dict[str, Tensor]:
        """Measures a call; see `toast.visual.targets.measure`.

        Args:
            seen: What saw the call.
            target: Masks `(batch, height, width)`, 0 to 1; not a number where a sample has none.

        Returns:
            Name -> `(batch,)`.
        """
        size = (target.shape[1], target.shape[2])
        return targets.measure(self.maps(seen, size), self.selection(seen, size), target, size)

"""Attention on target while a split is measured: of the forward pass that is made anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.visual.grids import Maps, has_class_token, has_token_attention, sequence_grid
from toast.visual.measures import share_in_target
from toast.visual.seeing import LastAttention, find_parts


class OnTarget:
    """Measures the share of the last block's attention that falls on each sample's target.

    The attention is the class token's over the patches, or the mean over all patches' where there is none;
    the mean over heads. Of an attentive probe it is the probe's own, the mean over its queries.

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

    def watching(self) -> LastAttention:
        """Returns what sees the last attention of the calls within it."""
        return LastAttention()

    def maps(self, seen: LastAttention, size: Sequence[int]) -> Maps:
        """Lays the attention that was seen out over the picture; each map sums to 1.

        Args:
            seen: What saw the call.
            size: Height and width of the picture in pixels.
        """
        attention = seen.attention.float().mean(1).cpu()
        tokens = attention.shape[-1] - self.behind  # VPT's prompts stand behind the patches
        attention = attention[:, :tokens, :tokens]
        grid = sequence_grid(self.parts, tokens, size)
        has_class = not self.is_probe and has_class_token(self.parts, grid)
        self.query = "probe" if self.is_probe else "class" if has_class else "mean"
        query = attention[:, grid.prefix :].mean(1) if self.query == "mean" else attention[:, 0]
        maps = grid.lay_out(query)
        return Maps(maps.values / maps.values.sum((1, 2), keepdim=True), maps.cell)

    def shares(self, seen: LastAttention, target: Tensor) -> Tensor:
        """Returns the share on each target.

        Args:
            seen: What saw the call.
            target: Masks `(batch, height, width)`, 0 to 1; not a number where a sample has none.

        Returns:
            `(batch,)`, 0 to 1; not a number where a sample has no target.
        """
        maps = self.maps(seen, target.shape[1:])
        target = target.float().cpu()
        known = ~target.flatten(1).isnan().any(1)
        shares = torch.full((len(target),), torch.nan)
        shares[known] = share_in_target(maps.values[known], target[known], maps.cell)
        return shares

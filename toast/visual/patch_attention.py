"""What the class token, or another query, attends to among the patches of a picture.

Whoever shows or measures attention over patches computes it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toast.visual.grids import Grid, Maps, has_class_token, sequence_grid
from toast.visual.relevance import of_head
from toast.visual.seeing import Parts

#: What attends: the class token, the patches on average, or the queries of an attentive probe on average.
AnyQuery = Literal["class", "mean", "probe"]


@dataclass(frozen=True)
class PatchAttention:
    """Reads the attention of one query over the patches out of an attention between tokens.

    Args:
        query: What attends.
        grid: Where the patches lie in the sequence.
        behind: Tokens behind the patches that have no place in the picture, such as VPT's prompts.
    """

    query: AnyQuery
    grid: Grid
    behind: int = 0

    def of_heads(self, attention: Tensor, head: int | Literal["mean"] = "mean") -> tuple[Maps, Tensor]:
        """Returns the maps of one head or of the mean over heads, see `of_tokens`.

        Args:
            attention: `(batch, heads, queries, tokens)`; averaged in float32 or finer.
            head: A head, or "mean".

        Raises:
            ValueError: If there is no such head.
        """
        return self.of_tokens(of_head(attention.to(_fine(attention.dtype)), head))

    def of_tokens(self, attention: Tensor) -> tuple[Maps, Tensor]:
        """Returns maps that sum to 1, and the share of the attention that was on patches before.

        Args:
            attention: How much each query takes from each token, `(batch, queries, tokens)`.
        """
        whole = attention.shape[-1] - self.behind
        from_patches = self.query == "mean"
        row = attention[:, self.grid.prefix : whole].mean(1) if from_patches else attention[:, 0]
        return shares(self.grid.lay_out(row[:, :whole]))


def patch_attention(
    parts: Parts, tokens: int, size: Sequence[int], query: AnyQuery | None = None, behind: int = 0
) -> PatchAttention:
    """Finds the patches in a sequence of tokens, and chooses what attends to them.

    Args:
        parts: Of the model.
        tokens: Length of the sequence.
        size: Height and width of the picture in pixels.
        query: What attends; None is the class token where there is one, else the mean patch.
        behind: Tokens behind the patches.

    Raises:
        ValueError: If no grid of patches fits, or a class token is asked for and there is none.
    """
    grid = sequence_grid(parts, tokens - behind, size)
    if query in ("class", None):
        has_class = has_class_token(parts, grid)
        if query == "class" and not has_class:
            raise no_class_token(parts)
        query = "class" if has_class else "mean"
    return PatchAttention(query, grid, behind)


def no_class_token(parts: Parts) -> ValueError:
    """Returns the error of a query that is not there."""
    return ValueError(
        f"query='class': the blocks of {type(parts.trunk).__name__} have no class token; use query='mean'."
    )


def shares(maps: Maps) -> tuple[Maps, Tensor]:
    """Returns maps that sum to 1, on the CPU, and what they summed to before, `(batch,)`."""
    values = fine(maps.values)
    total = values.sum((1, 2))
    return Maps(values / total.clamp(min=torch.finfo(values.dtype).tiny)[:, None, None], maps.cell), total


def fine(values: Tensor) -> Tensor:
    """Returns values without their graph, on the CPU, in float32 or finer."""
    return values.detach().to("cpu", _fine(values.dtype))


def _fine(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

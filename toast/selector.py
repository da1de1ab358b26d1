"""The selector around the final norm: which tokens and channels matter for the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.config import ToastConfig
from toast.layer import ToastLayer
from toast.passes import current_pass
from toast.tokens import channels_last

#: What stands before the adapter's name in the name of a fused feedback's buffer.
FUSED = "fused_"


@dataclass
class Selection:
    """What the selector makes of the features. Channels last.

    Args:
        features: The features that were read, `(batch, tokens, width)`.
        weights: The selection weights, `(batch, tokens)`, from 0 to 1.
        channel_transform: P, `(width, width)`.
        fused: What maps the weighted features to all blocks' shifts, if the model is fused.
    """

    features: Tensor
    weights: Tensor
    channel_transform: Tensor
    fused: Tensor | None = None
    _detached: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Tensor:
        """Features after token selection: w · h."""
        return self.weights[..., None] * self.features

    def detached_tokens(self, dtype: torch.dtype) -> Tensor:
        """Returns the tokens without their graph, in a dtype; computed once for all blocks."""
        if dtype not in self._detached:
            with torch.no_grad():  # activation checkpointing counts what is saved, and finds it made later
                self._detached[dtype] = self.tokens.to(dtype)
        return self._detached[dtype]

    @property
    def selected(self) -> Tensor:
        """Features after token and channel selection: (w · h) P."""
        return self.tokens @ self.channel_transform


class ToastSelector(ToastLayer):
    """Wraps the final norm: reads the features of the first pass and selects what matters for the task.

    Eq. of arXiv 2305.15542, section 3:  w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P.

    Args:
        base_layer: The final norm.
        width: Channels of the features.
        reads: How the norm takes part, see `Family.reads`.
        tokens: The family's order of tokens, see `toast.tokens`.
    """

    adapter_layer_names = ("toast_task_embedding", "toast_channel_transform")

    def __init__(self, base_layer: nn.Module, width: int, reads: str, tokens: str) -> None:
        super().__init__(base_layer, width)
        self.reads = reads
        self.tokens = tokens
        self.toast_task_embedding = nn.ParameterDict()
        self.toast_channel_transform = nn.ParameterDict()

    def update_layer(self, adapter: str, config: ToastConfig, fresh: dict[str, Any]) -> None:
        """Adds the parameters of an adapter: a random task embedding, the identity as channel transform.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            fresh: `device` and `dtype` of new parameters. The norm may have none of its own to go by.
        """
        self.configs[adapter] = config
        self._buffers.pop(f"{FUSED}{adapter}", None)  # it was made of other weights
        self.toast_task_embedding[adapter] = nn.Parameter(torch.randn(self.width, **fresh))
        self.toast_channel_transform[adapter] = nn.Parameter(torch.eye(self.width, **fresh))

    def groups(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the task embedding `(width,)` and the channel transform `(width, width)`."""
        yield "task_embedding", self.toast_task_embedding[adapter]
        yield "channel_transform", self.toast_channel_transform[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the norm; in the first pass of this model it leaves input and output with the call."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        call = current_pass()
        if call is not None and call.reads is self and self.reads == "norm":
            call.features = self.read(x, out)
        return out

    def read(self, unnormed: Tensor, normed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns un-normed and normed features, channels last.

        Args:
            unnormed: What the blocks gave, in the family's order of tokens.
            normed: What the norm made of it; None if it was not given all of it.
        """
        if normed is None:
            normed = self.base_layer(unnormed) if self.reads == "block" else unnormed
        return channels_last(unnormed, self.tokens), channels_last(normed, self.tokens)

    def select(self, unnormed: Tensor | None, normed: Tensor | None) -> Selection:
        """Selects tokens, then channels.

        Args:
            unnormed: Features before the final norm, channels last; None if they are not read.
            normed: Features after it.
        """
        assert self.adapter is not None
        task_embedding = self.toast_task_embedding[self.adapter]
        compared, features = {
            "normed": (normed, normed),
            "unnormed": (unnormed, unnormed),
            "mixed": (normed, unnormed),
        }[self.config.select_features or "normed"]
        assert compared is not None
        assert features is not None
        compared, features = compared.to(task_embedding), features.to(task_embedding)
        weights = F.cosine_similarity(compared, task_embedding, dim=-1).clamp(0, 1)
        transform = self.toast_channel_transform[self.adapter]
        return Selection(features, weights, transform, self._buffers.get(f"{FUSED}{self.adapter}"))

"""The selector around the final norm: which tokens and channels matter for the task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.adapter import Adapter
from toast.compiled import is_transformed
from toast.config import ToastConfig
from toast.families.tokens import channels_last
from toast.fusion import FUSED
from toast.layer import ToastLayer
from toast.signals import Selection
from toast.thread_state import current_pass

logger = logging.getLogger(__name__)


class ToastSelector(ToastLayer):
    """Wraps the final norm: reads the features of the first pass and selects what matters for the task.

    Eq. of arXiv 2305.15542, section 3:  w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P.

    Args:
        base_layer: The final norm.
        width: Channels of the features.
        reads: How the norm takes part, see `Family.reads`.
        tokens: The family's order of tokens, see `toast.families.tokens`.
    """

    adapter_layer_names = ("toast_task_embedding", "toast_channel_transform")

    def __init__(self, base_layer: nn.Module, width: int, reads: str, tokens: str) -> None:
        super().__init__(base_layer, width)
        self.reads = reads
        self.tokens = tokens
        self.toast_task_embedding = nn.ParameterDict()
        self.toast_channel_transform = nn.ParameterDict()
        self.start = SelectorStart()

    def update_layer(self, adapter: str, config: ToastConfig, fresh: dict[str, Any]) -> None:
        """Adds the parameters of an adapter: a random task embedding, the identity as channel transform.

        The cosine does not see the embedding's length, but what a step turns it by falls with it: new ones
        have unit length. With `init="official"` it is drawn as the official code does.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            fresh: `device` and `dtype` of new parameters. The norm may have none of its own to go by.
        """
        self.configs[adapter] = config
        self.drop_fused(adapter)  # it was made of other weights
        drawn = torch.randn(self.width, **fresh)
        drawn = drawn if config.init == "official" else F.normalize(drawn, dim=0)
        self.toast_task_embedding[adapter] = nn.Parameter(drawn)
        self.start.keep(adapter, self.toast_task_embedding[adapter])
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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.configs:
            if f"{prefix}toast_task_embedding.{name}" in state_dict:
                self.start.forget(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def drop_fused(self, adapter: str) -> None:
        """Forgets the fused matrix of an adapter."""
        self._buffers.pop(f"{FUSED}{adapter}", None)
        self.fusions.pop(adapter, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter as PEFT does, with its fused matrix."""
        self.drop_fused(adapter_name)
        super().delete_adapter(adapter_name)

    def start_from(self, adapter: Adapter, unnormed: Tensor | None, normed: Tensor | None) -> None:
        """Sees to it that a task embedding which is as it was drawn selects something of its first features.

        Args:
            adapter: The adapter of the call.
            unnormed: See `select`.
            normed: See `select`.
        """
        compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if compiled and adapter.name in self.start.untouched:
            compared, _ = self._read_by(adapter, unnormed, normed)
            self.start.wake_compiled(adapter.name, adapter.task_embedding, compared)
        elif self.start.is_open(adapter.name):
            compared, _ = self._read_by(adapter, unnormed, normed)
            self.start.wake(adapter.name, adapter.task_embedding, compared)

    def select(self, adapter: Adapter, unnormed: Tensor | None, normed: Tensor | None) -> Selection:
        """Selects tokens, then channels.

        Args:
            adapter: The adapter of the call.
            unnormed: Features before the final norm, channels last; None if they are not read.
            normed: Features after it.
        """
        compared, features = self._read_by(adapter, unnormed, normed)
        weights = F.cosine_similarity(compared, adapter.embedding_for(compared), dim=-1).clamp(0, 1)
        if self.training and not adapter.attends:
            self.start.watch(adapter.name, adapter.task_embedding, weights)
        return Selection(features, weights, adapter.channel_transform)

    def _read_by(
        self, adapter: Adapter, unnormed: Tensor | None, normed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the features that are compared with the task embedding, and those that are selected."""
        compared, features = {
            "normed": (normed, normed),
            "unnormed": (unnormed, unnormed),
            "mixed": (normed, unnormed),
        }[adapter.config.select_features or "normed"]
        assert compared is not None
        assert features is not None
        return compared.to(adapter.task_embedding), features.to(adapter.task_embedding)


class SelectorStart:
    """Sees to it that a selector does not start dead, where no token passes and none ever will.

    Features can share a direction, those of language models do, and a random task embedding can point the
    other way. Then every cosine is negative, every weight 0, and the clamp at 0 gives no gradient.
    """

    def __init__(self) -> None:
        self.untouched: dict[str, Tensor] = {}
        self.watched: dict[str, int] = {}

    def keep(self, adapter: str, task_embedding: Tensor) -> None:
        """Remembers what an adapter's task embedding was drawn as."""
        self.watched[adapter] = 0
        self.untouched.pop(adapter, None)
        if not task_embedding.is_meta:
            self.untouched[adapter] = task_embedding.detach().clone()

    def forget(self, adapter: str) -> None:
        """Takes a task embedding as it is: it was loaded."""
        self.untouched.pop(adapter, None)

    def is_open(self, adapter: str) -> bool:
        """Whether a task embedding may be as it was drawn, and its features can be looked at.

        Each of several processes would meet features of its own, so there it is left as it is.
        """
        return not is_transformed() and adapter in self.untouched and not _several_processes()

    @torch.no_grad()
    def wake(self, adapter: str, task_embedding: Tensor, compared: Tensor) -> None:
        """Turns a task embedding round that is as it was drawn and selects nothing of the first features.

        A draw is as likely as its opposite.

        Args:
            adapter: Name of the adapter.
            task_embedding: Its task embedding, `(width,)`; written to.
            compared: The features that it is compared with, channels last.
        """
        if type(compared) is not Tensor or not isinstance(task_embedding, nn.Parameter):
            return  # a tensor that stands for another, or one that a function was called with
        highest = F.cosine_similarity(compared, task_embedding, dim=-1).max()
        drawn = self.untouched.pop(adapter, None) if highest.isfinite() else None
        # None if another thread does it. A model may have been cast or moved since.
        if drawn is not None and highest <= 0 and torch.equal(drawn.to(task_embedding), task_embedding):
            task_embedding.neg_()

    @torch.no_grad()
    def wake_compiled(self, adapter: str, task_embedding: Tensor, compared: Tensor) -> None:
        """Does the same in a call that Dynamo traces; the next call is compiled without it.

        Args:
            adapter: As in `wake`.
            task_embedding: As in `wake`.
            compared: As in `wake`.
        """
        self.untouched.pop(adapter)
        highest = F.cosine_similarity(compared, task_embedding, dim=-1).max()
        task_embedding.mul_(torch.where(highest <= 0, -1.0, 1.0).to(task_embedding))

    @torch.no_grad()
    def watch(self, adapter: str, task_embedding: Tensor, weights: Tensor) -> None:
        """Says once if nothing is selected in training.

        It looks at calls 1, 2, 4, 8, …, for the host waits for an accelerator to look.

        Args:
            adapter: Name of the adapter.
            task_embedding: Its task embedding.
            weights: The selection weights of a call.
        """
        if is_transformed() or not task_embedding.requires_grad:
            return
        if type(weights) is not Tensor:  # one that stands for another, maybe without values
            return
        calls = self.watched[adapter] = self.watched.get(adapter, 0) + 1
        if calls > 0 and calls & (calls - 1) == 0 and not weights.any():
            self.watched[adapter] = -(2**62)
            logger.warning(
                "adapter %r selects no token: the cosine of every feature with the task embedding is "
                "negative, and gets no gradient. Start it from the data: toast.calibrate(model, inputs).",
                adapter,
            )


def _several_processes() -> bool:
    spread = torch.distributed
    return spread.is_available() and spread.is_initialized() and spread.get_world_size() > 1

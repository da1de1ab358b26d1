"""The loss of a step as one module, so that Accelerate wraps all of it: data parallel, sharded, autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from toast.objectives import pretraining_loss
from toast.reusing import given_first_pass
from toast.stored_pass import FirstPass
from toast.training.answer_kinds import Answers
from toast.training.backbones import Backbone


class Objective(nn.Module):
    """Maps a batch to the loss of a stage, or to logits.

    Args:
        model: The model that is trained.
        backbone: How it is fed.
        answers: What its outputs are held against: the loss.
        stage: `pretune`: task loss averaged over both passes, plus the reconstruction loss
            (arXiv 2305.15542, section 3.3); `tune`: the task loss of the model's output.
        head: Module that takes the stored features of a batch; None if there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        answers: Answers,
        stage: Literal["pretune", "tune"],
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.feed = backbone.feed
        self.logits_of = backbone.logits
        self.answers = answers
        self.stage = stage
        self.__dict__["head"] = head  # a part of the model already: not registered twice

    def forward(
        self, batch: dict[str, Any], count: float | Tensor = 1.0, share: int = 1, predict: bool = False
    ) -> dict[str, Tensor] | Tensor:
        """Computes the loss, or the logits.

        Args:
            batch: What the collator made: `pixels` or `input_ids`, `labels`; with what is stored of the
                samples under `first_pass` or `features`.
            count: Targets that the sum of losses is divided by: those of all processes and micro-batches, so
                that neither changes the gradient. Whole numbers, which mixed precision leaves as they are.
            share: Processes times micro-batches, by which the count is divided.
            predict: Return the logits, `(batch, classes)` or `(batch, tokens, vocabulary)`.

        Returns:
            `loss` and its detached parts; or the logits.
        """
        if predict:
            return self._logits(batch)
        labels = batch["labels"]
        if isinstance(count, Tensor):
            count = count.float()
        count = count / share
        if self.stage == "pretune":
            args, kwargs = self.feed(batch)
            loss, parts = pretraining_loss(
                self.model,
                *args,
                task_loss=lambda out: self.answers.loss(self.logits_of(out), labels) / count,
                **kwargs,
            )
            return {"loss": loss, **parts}
        return {"loss": self.answers.loss(self._logits(batch), labels) / count}

    def tie_weights(self) -> None:
        """Ties again what the backbone ties; Accelerate asks for it where it has made parameters anew."""
        tie: Any = getattr(self.model, "tie_weights", None)
        if tie is not None:
            tie()

    def _logits(self, batch: dict[str, Any]) -> Tensor:
        if "features" in batch:
            head: Callable[..., Tensor] = self.__dict__["head"]
            return head(batch["features"])
        stored: FirstPass | None = batch.get("first_pass")
        args, kwargs = self.feed(batch)
        with nullcontext() if stored is None else given_first_pass(self.model, stored):
            logits = self.logits_of(self.model(*args, **kwargs))
        # Prompts of PEFT stand before the text and have logits of their own. Without any nothing is cut: the
        # gradient of a cut is as large as all logits.
        before = logits.shape[1] - batch["input_ids"].shape[1] if self.answers.outputs is None else 0
        return logits[:, before:] if before else logits

"""Measures of a language model, over all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from toast.evaluation.aggregation import IGNORED, Average, joining


class LanguageMetrics:
    """Loss, perplexity and accuracy of a causal language model; every token counts the same.

    Processes of torch.distributed are joined in `compute`, whatever tokens each has seen.

    Args:
        device: Where logits will be.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.loss, self.hits = Average(device), Average(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: `(batch, tokens, vocabulary)`.
            labels: What they predict, `(batch, tokens)`; -100 leaves a token out. The logits of a causal
                model are for the next token, so give `logits[:, :-1]` and `labels[:, 1:]`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                "logits, labels: need shapes (batch, tokens, vocabulary) and (batch, tokens); "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        counted = labels != IGNORED
        logits, labels = logits.detach()[counted], labels[counted]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.loss.update(cross_entropy(logits, labels, reduction="none"))
        self.hits.update((logits.argmax(-1) == labels).float())

    def compute(self) -> dict[str, Any]:
        """Returns the measures of all tokens of all processes.

        Returns:
            By name: `tokens` that were predicted; `loss`, mean cross-entropy of a token in nats;
            `perplexity`, its exponential; `token_accuracy`, 0 to 1.

        Raises:
            ValueError: If no process has seen a labelled token.
        """
        with joining():
            loss, tokens = self.loss.compute()
            hits, _ = self.hits.compute()
        if not tokens:
            raise ValueError("no token with a label was measured; needs at least one.")
        loss = float(loss)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond, a double overflows
        return {
            "tokens": int(tokens),
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": float(hits),
        }

    def reset(self) -> None:
        """Forgets all tokens."""
        self.loss.reset()
        self.hits.reset()

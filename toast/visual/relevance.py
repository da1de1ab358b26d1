"""Beyond one block's attention: rollout through the blocks, and what a score's gradient says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toast.tracing import SeenAttention


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention rollout: how much of each input token arrives in each token.  R = Π_l (A_l + 1) / 2.

    Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv 2005.00928, section 3.

    Args:
        attentions: Of one block after the other, bottom first, `(batch, tokens, tokens)`, heads averaged.

    Returns:
        `(batch, tokens, tokens)`; rows sum to 1 if those of the attentions do.
    """
    whole = torch.eye(attentions[0].shape[-1]).to(attentions[0]).expand_as(attentions[0])
    for attention in attentions:
        whole = (attention @ whole + whole) / 2
    return whole


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor], head: int | str = "mean") -> Tensor:
    """Gradient-weighted relevance of tokens for a score.  R ← R + E_h[(∇A ⊙ A)⁺] R, from R = 1.

    Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", arXiv 2103.15679, equations 5 and 6.

    Args:
        attentions: Of one block after the other, bottom first, `(batch, heads, tokens, tokens)`.
        gradients: Of the score with respect to each.
        head: A head, or "mean".

    Returns:
        `(batch, tokens, tokens)`, without the 1 that it starts from.
    """
    own = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    whole = own.expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        weighed = of_head((gradient * attention).clamp(min=0), head)
        whole = whole + weighed @ whole
    return whole - own


def grad_cam(states: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: states weighed by the mean gradient of their channel.  (Σ_c ḡ_c x_c)⁺.

    Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2. Written out, for libraries hook a layer and
    would take one pass of two for the other.

    Args:
        states: `(batch, ..., channels)`.
        gradients: Of the score with respect to them.

    Returns:
        `(batch, ...)`, not negative.
    """
    places = tuple(range(1, states.ndim - 1))
    weights = gradients.mean(places, keepdim=True)
    return (weights * states).sum(-1).clamp(min=0)


def energy(states: Tensor) -> Tensor:
    """Activation energy, the sum of squares over channels: where a model without attention has much to say.

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928, F²_sum.

    Args:
        states: `(batch, ..., channels)`.

    Returns:
        `(batch, ...)`.
    """
    return states.square().sum(-1)


def of_head(attention: Tensor, head: int | str) -> Tensor:
    """Returns one head, or the mean over heads, of `(batch, heads, queries, keys)`.

    Raises:
        ValueError: If there is no such head.
    """
    if head == "mean":
        return attention.mean(1)
    heads = attention.shape[1]
    if not isinstance(head, int) or not -heads <= head < heads:
        raise ValueError(f"head: the attention has heads 0 to {heads - 1}, or 'mean'; got {head!r}.")
    return attention[:, head]


def attention_gradients(score: Tensor, attentions: Sequence[SeenAttention]) -> list[Tensor]:
    """Returns the gradient of a score with respect to each attention of the call that made it.

    Args:
        score: `(batch,)`, with a graph.
        attentions: Attentions of that call.

    Raises:
        ValueError: If an attention has no graph.
    """
    outputs = [seen.output for seen in attentions]
    if not all(output.requires_grad for output in outputs):
        raise ValueError(
            "relevance needs the gradient of every block up to the shown one, and one of them ran without a "
            "graph. Use method='rollout' or 'grad-cam'."
        )
    found = torch.autograd.grad(score.sum(), outputs)
    return [seen.gradient(of) for seen, of in zip(attentions, found, strict=True)]


def class_scores(output: Any) -> Tensor | None:
    """Returns what a model says of the classes, `(batch, classes)`; None if it gives no scores."""
    scores = getattr(output, "logits", output)
    return scores if isinstance(scores, Tensor) and scores.ndim == 2 else None

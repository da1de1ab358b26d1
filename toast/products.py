"""The product of weighted tokens with a matrix, with a backward that knows that the features are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class WeightedProduct(torch.autograd.Function):
    """y = (w · h) N for weights w, frozen features h and a matrix N.

    Nobody needs the gradient of the features, only that of the weights, one number a token:

        ∂w_t = ⟨∂y_t, h_t N⟩ = ⟨∂y_t, y_t⟩ / w_t,   and 0 where w_t = 0, as it is clamped there.

    So backward has one product of matrices, that of N, and not two.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, tokens: Tensor, matrix: Tensor) -> Tensor:
        """Returns `tokens @ matrix`.

        Args:
            ctx: Keeps what backward needs.
            weights: w, `(batch, tokens)`.
            tokens: w · h, `(batch, tokens, width)`, detached.
            matrix: N, `(width, value_width)`.
        """
        out = tokens @ matrix
        ctx.save_for_backward(weights, tokens, out if ctx.needs_input_grad[0] else None)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Returns the gradients of the weights and of the matrix."""
        weights, tokens, out = ctx.saved_tensors
        of_weights = of_matrix = None
        if ctx.needs_input_grad[0]:
            along = torch.linalg.vecdot(grad.to(weights.dtype), out.to(weights.dtype))
            of_weights = torch.where(weights > 0, along / weights.clamp_min(torch.finfo(along.dtype).tiny), 0)
        if ctx.needs_input_grad[2]:
            of_matrix = tokens.flatten(0, -2).T @ grad.flatten(0, -2)
        return of_weights, None, of_matrix


def weighted_product(weights: Tensor, tokens: Tensor, matrix: Tensor) -> Tensor:
    """Returns (w · h) N, differentiable in the weights and the matrix.

    Args:
        weights: w, `(batch, tokens)`.
        tokens: w · h, detached, in the dtype of the product, `(batch, tokens, width)`.
        matrix: N, in the same dtype, `(width, value_width)`.
    """
    return WeightedProduct.apply(weights, tokens, matrix)  # type: ignore[no-any-return,no-untyped-call]

"""The losses of the two stages that are the method's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from toast.families.tokens import fit
from toast.steering import steering_of
from toast.tracing import Trace, trace


def reconstruction_loss(model: nn.Module, traced: Trace) -> Tensor:
    """Returns how well `to_state` tells from a block's output what entered it, without the factor λ.

    By the configuration's `reconstruction_form`, over the blocks of the second pass (arXiv 2305.15542,
    section 3.3), where `sg` stops the gradient:

    - `relative`: the mean over blocks and tokens of  2 ‖A_l sg(out) − sg(in)‖² / (‖sg(out)‖² + ‖sg(in)‖²).
      With `A_l = I` it is between 0 and 4 whatever the states' size and the depth. The size of both is
      taken, for where a block makes a small state a hundred times as large, the target's own would make
      that block outweigh all others. Every token counts alike, so a few of a size of thousands do not
      drown the rest; and a mean over tokens is the same over processes and micro-batches as over one batch.
    - `official`: Σ_l mean ‖c A_l sg(out_l) − c sg(in_l)‖², with the configuration's `reconstruction_scale`
      as c.

    λ is its `reconstruction_weight`. Half precision is computed in single precision.

    Args:
        model: A wrapped model.
        traced: `toast.trace(model, ..., block_states=True)`.

    Raises:
        ValueError: If the model has no active adapter or the trace has no block states.
    """
    _, adapter = steering_of(model, "reconstruction_loss")
    if len(traced.states) != len(adapter.maps):
        raise ValueError(
            "reconstruction_loss needs the states of all blocks: toast.trace(..., block_states=True)."
        )
    relative, scale = adapter.config.reconstruction_form == "relative", adapter.config.reconstruction_scale
    terms = []
    for maps in adapter.maps:
        entering, leaving = (state.detach() for state in traced.states[maps.unit.number])
        states = leaving.to(next(maps.to_state.parameters()).dtype)
        if torch.is_grad_enabled() and hasattr(maps.to_state, "reshard"):
            # A map that FSDP gathers stays whole, with its gradient, until its input has one.
            states = states.clone().requires_grad_()
        guess = maps.bring_down(states)
        if guess.ndim == 4:
            guess = fit(guess, *entering.shape[1:3])
        guess = guess.to(torch.promote_types(guess.dtype, torch.float32))
        target = entering.to(guess)
        if relative:
            sizes = _mean_square(target) + _mean_square(_on_grid_of(target, leaving))
            terms.append((2 * _mean_square(guess - target) / torch.where(sizes > 0, sizes, 1)).mean())
        else:
            terms.append(F.mse_loss(guess * scale, target * scale))
    return sum(terms[1:], start=terms[0]) / (len(terms) if relative else 1)


def _mean_square(states: Tensor) -> Tensor:
    """Returns the mean square of each token's channels, `(..., tokens)`."""
    return states.square().mean(-1)


def _on_grid_of(target: Tensor, leaving: Tensor) -> Tensor:
    """Returns what leaves a block in the target's precision, and on its grid where that is finer."""
    leaving = leaving.to(target)
    if target.ndim == 3 or leaving.shape[1:3] == target.shape[1:3]:
        return leaving
    rows, columns = (
        -(-fine // coarse) for fine, coarse in zip(target.shape[1:3], leaving.shape[1:3], strict=True)
    )
    return fit(repeat(leaving, "b h w c -> b (h r) (w s) c", r=rows, s=columns), *target.shape[1:3])


def pretraining_loss(
    model: nn.Module, *inputs: Any, task_loss: Callable[[Any], Tensor], **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the first stage: the task loss averaged over both passes, plus the reconstruction.

    Args:
        model: A wrapped model.
        *inputs: Inputs of the model.
        task_loss: Maps an output of the model to a scalar loss.
        **kwargs: Further inputs.

    Returns:
        The loss, and its detached parts `first_task`, `task` and `reconstruction`.
    """
    steering, adapter = steering_of(model, "pretraining_loss")
    with steering.holding(adapter):
        traced = trace(model, *inputs, block_states=True, **kwargs)
        reconstruction = reconstruction_loss(model, traced)
    first, second = task_loss(traced.first_output), task_loss(traced.output)
    loss = (first + second) / 2 + adapter.config.reconstruction_weight * reconstruction
    parts = {"first_task": first, "task": second, "reconstruction": reconstruction}
    return loss, {name: part.detach() for name, part in parts.items()}

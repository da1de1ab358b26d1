"""The losses of the two stages that are the method's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from toast.model import active_parts
from toast.tokens import fit
from toast.tracing import Trace, trace


def reconstruction_loss(model: nn.Module, traced: Trace) -> Tensor:
    """Returns Σ_l mean ‖c A_l sg(out_l) − c sg(in_l)‖² over the second pass's blocks, without its factor.

    `to_state` learns to tell from a block's output what entered it (arXiv 2305.15542, section 3.3). `c` is
    the configuration's `reconstruction_scale`; the factor λ is its `reconstruction_weight`.

    Args:
        model: A wrapped model.
        traced: `toast.trace(model, ..., block_states=True)`.

    Raises:
        ValueError: If the model has no active adapter or the trace has no block states.
    """
    _, adapter = active_parts(model, "reconstruction_loss")
    if len(traced.states) != len(adapter.maps):
        raise ValueError(
            "reconstruction_loss needs the states of all blocks: toast.trace(..., block_states=True)."
        )
    scale = adapter.config.reconstruction_scale
    terms = []
    for maps in adapter.maps:
        entering, leaving = traced.states[maps.layer.unit.number]
        guess = maps.bring_down(leaving.detach().to(next(maps.to_state.parameters()).dtype))
        if guess.ndim == 4:
            guess = fit(guess, *entering.shape[1:3])
        terms.append(F.mse_loss(guess * scale, entering.detach().to(guess.dtype) * scale))
    return sum(terms[1:], start=terms[0])


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
    steering, adapter = active_parts(model, "pretraining_loss")
    with steering.holding(adapter):
        traced = trace(model, *inputs, block_states=True, **kwargs)
        reconstruction = reconstruction_loss(model, traced)
    first, second = task_loss(traced.first_output), task_loss(traced.output)
    loss = (first + second) / 2 + adapter.config.reconstruction_weight * reconstruction
    parts = {"first_task": first, "task": second, "reconstruction": reconstruction}
    return loss, {name: part.detach() for name, part in parts.items()}

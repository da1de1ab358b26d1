"""Activation checkpointing: what recomputes a block later runs it in the pass of its call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from toast.calls.wrapped import WrappedModel
from toast.thread_state import current_pass, current_signals, running

#: Hooks of transformers and PEFT that make what embeddings give require a gradient.
REQUIRE_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")

REENTRANT = (
    "re-entrant activation checkpointing loses the gradient of the top-down signals; use the other kind: {}."
)


class Carrying:
    """A checkpointing function that runs what it checkpoints, and recomputes it, in the pass of the call."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`."""
        this, here = current_pass(), current_signals()
        if this is None:
            return self.checkpoint(function, *args, **kwargs)

        def in_pass(*inputs: Any) -> Any:
            with running(this, here):
                return function(*inputs)

        return self.checkpoint(in_pass, *args, **kwargs)


class NotInFirstPass:
    """A forward hook of somebody else's that is left out in the first pass of a wrapped model.

    Args:
        steering: The wrapped model's parts.
        hook: The hook.
    """

    def __init__(self, steering: WrappedModel, hook: Callable[..., Any]) -> None:
        self.steering = steering
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        """Calls the hook."""
        this = current_pass()
        if this is not None and this.owner is self.steering and this.number == 1:
            return None
        return self.hook(*args)


def carry_passes(steering: WrappedModel) -> bool:
    """Lets checkpointing functions of blocks carry the pass; True if the trunk checkpoints its blocks.

    Raises:
        ValueError: If checkpointing is re-entrant: it would lose the gradient of the signals.
    """
    for block in steering.blocks:
        if not (getattr(block, "gradient_checkpointing", False) and block.training):
            continue
        checkpoint = block.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, Carrying):
            keywords = getattr(checkpoint, "keywords", None)
            if keywords is not None and keywords.get("use_reentrant", True):  # the default of torch
                raise ValueError(REENTRANT.format("gradient_checkpointing_kwargs={'use_reentrant': False}"))
            block._gradient_checkpointing_func = Carrying(checkpoint)  # type: ignore[assignment]
    holders = {name.rpartition(".")[0].rpartition(".")[0] for name in steering.block_names}
    if not any(getattr(steering.trunk.get_submodule(at), "grad_checkpointing", False) for at in holders):
        return False
    from timm.layers import use_reentrant_ckpt

    if use_reentrant_ckpt():
        raise ValueError(REENTRANT.format("timm.layers.set_reentrant_ckpt(False)"))
    return True


def tame_input_hooks(steering: WrappedModel) -> None:
    """Keeps hooks that make embeddings require a gradient to the second pass.

    transformers and PEFT register them for activation checkpointing. Nobody asks for that gradient, and
    the first pass would keep a graph for it.
    """
    for hooks in _embedding_hooks(steering):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__name__", "") in REQUIRE_GRADIENTS:
                hooks[key] = NotInFirstPass(steering, hook)


def untame_input_hooks(steering: WrappedModel) -> None:
    """Puts the hooks back as they were."""
    for hooks in _embedding_hooks(steering):
        for key, hook in list(hooks.items()):
            if isinstance(hook, NotInFirstPass) and hook.steering is steering:
                hooks[key] = hook.hook


def _embedding_hooks(steering: WrappedModel) -> Iterator[dict[int, Any]]:
    for module in (steering.model, steering.trunk):
        embeddings: Any = getattr(module, "get_input_embeddings", lambda: None)
        try:
            embeddings = embeddings()
        except NotImplementedError:
            continue
        yield getattr(embeddings, "_forward_hooks", {})

"""`toast.attend_to`: calls that are steered by what the caller gives, in the place of the task embedding."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from toast.compiled import is_transformed
from toast.files.tensors import is_finite
from toast.steering import steering_of
from toast.thread_state import giving


def attend_to(model: nn.Module, embedding: Tensor) -> AbstractContextManager[None]:
    """Makes the calls of a model attend to what resembles an embedding, and not to what its adapter learnt.

    The selector then weighs tokens by their cosine with the embedding: a patch's feature, a class's mean
    feature, a text's embedding projected to the width. It compares it with the features that it reads,
    `toast.first_pass(model, ...).normed`. These share a direction, so subtract their mean, or every token is
    passed. The adapter stays as it is, and its task embedding gets no gradient; the one given here does if it
    requires one.

    It holds in this thread until the `with` block ends. One of a generator or a coroutine holds while that
    runs: not between two `yield`s, nor for other coroutines while it waits. A call takes the embedding with
    the adapter, when it begins. A stored first pass serves any embedding.

    Args:
        model: A wrapped model with an active adapter.
        embedding: `(width,)`, or one for each sample of the calls, `(batch, width)`, of any length.

    Raises:
        ValueError: If the model has no active adapter, or the embedding is of another shape, not finite or
            zero; when called, also if there are not as many embeddings as samples.

    Example:
        >>> import timm, toast, torch
        >>> model = toast.wrap(timm.create_model("vit_tiny_patch16_224")).eval()
        >>> images = torch.randn(2, 3, 224, 224)
        >>> features = toast.first_pass(model, images).normed
        >>> marked = features[:, 100] - features.mean(1)  # a patch of each picture
        >>> with toast.attend_to(model, marked), torch.no_grad():
        ...     seen = toast.trace(model, images)
        >>> seen.selection_weights[:, 1:].argmax(1)
        tensor([99, 99])
    """
    steering, _ = steering_of(model, "attend_to")
    width = steering.selector.width
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        got = embedding.dtype if isinstance(embedding, Tensor) else type(embedding).__name__
        raise ValueError(f"attend_to needs an embedding of floating-point numbers; got {got}.")
    if embedding.ndim not in (1, 2) or embedding.shape[-1] != width or not embedding.numel():
        raise ValueError(
            f"attend_to needs an embedding of shape ({width},), the width of the features that the selector "
            f"reads, or one for each sample, (batch, {width}); got {tuple(embedding.shape)}."
        )
    if not is_transformed() and not (is_finite(embedding) and embedding.detach().any(-1).all()):
        raise ValueError(
            "attend_to needs a direction; an embedding is zero or not finite (it holds NaN or infinities)."
        )
    return giving(steering, embedding)

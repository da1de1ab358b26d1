"""Attentive probing: learnt queries pool the frozen model's final tokens for the head.

Multi-query cross-attention after Psomas et al., "Attention, Please!" (arXiv 2506.10178): queries meet the
tokens themselves, without a projection to keys, and each pools its own part of the values' channels. timm's
`AttentionPoolLatent` has all projections, and averages what its queries pool.

The model's own forward runs; hooks read the tokens behind the final norm, and give the head what was pooled
in the place of what the model pools.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.baselines.added import Added, find_added, remove_added
from toast.baselines.heads import head_of
from toast.families.anatomy import Anatomy, find_anatomy

#: Where the probe stands in the trunk.
NAME = "probe"

_running = threading.local()


class AttentivePool(Added):
    """`y_k = softmax(q_k Xᵀ / √d) X V_k`, the parts of all queries put beside each other.

    Queries start so small that every token weighs alike.

    Args:
        width: Channels of a token, `d`.
        queries: Number of queries, `k` from 1 to it.
        out: Channels of the result, a multiple of `queries`; `V_k` maps to `out / queries` of them.
    """

    def __init__(self, width: int, queries: int, out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.values = nn.Linear(width, out)
        nn.init.normal_(self.queries, std=width**-0.5)

    @property
    def options(self) -> dict[str, Any]:
        """What `add_probe` has to be given to make the same again."""
        return {"queries": len(self.queries)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Pools tokens `(batch, tokens, width)`, in its own precision.

        Returns:
            `(batch, out)`, in the precision of the tokens.
        """
        x = tokens.to(self.values.weight.dtype)
        count = len(self.queries)
        query = self.queries[:, None].expand(len(x), -1, -1, -1)
        key = x[:, None].expand(-1, count, -1, -1)
        value = self.values(x).unflatten(-1, (count, -1)).transpose(1, 2)
        # PyTorch's call, so that what looks at attention sees this one last: a head for each query.
        pooled = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return pooled.flatten(1).to(tokens.dtype)

    def stand_between(self, norm: nn.Module, head: nn.Module) -> None:
        """Puts the hooks on the final norm and on the head."""
        self.handles = [norm.register_forward_hook(self.keep), head.register_forward_pre_hook(self.pool)]

    def keep(self, norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Keeps the tokens, for this thread, until the head is called."""
        _tokens()[self] = out

    def pool(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """Pools the tokens for the head: those of the pass, or those that the head was called with."""
        (given,) = args
        return (self(given if given.ndim == 3 else _tokens().pop(self)),)

    def extra_repr(self) -> str:
        """Says how many queries there are."""
        return f"queries={len(self.queries)}"


def make_probe(model: nn.Module, queries: int = 8) -> tuple[Anatomy, nn.Module, AttentivePool]:
    """Makes the probe for a model, and leaves the model as it is.

    Returns:
        The model's parts, its head, and the probe on the device of the head, in its precision or float32 if
        that is coarser.

    Raises:
        ValueError: If the model has no sequence of tokens, no linear head, or a probe already, or the number
            of queries does not divide the head's inputs.
    """
    anatomy = find_anatomy(model)
    trunk, family = anatomy.trunk, anatomy.family
    if family.kind != "vision" or family.tokens != "sequence":
        raise ValueError(
            "attentive probe: needs a vision model whose tokens are a sequence, such as a ViT; got "
            f"{type(trunk).__name__} (family {family.name})."
        )
    if NAME in trunk._modules:
        raise ValueError(f"{type(trunk).__name__} has a probe already; remove_probe(model) removes it.")
    name, head = head_of(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(  # noqa: TRY004 - the model does not fit, not the argument's type
            f"attentive probe: needs a linear head; got {type(head).__name__} at {name!r}."
        )
    if queries < 1 or head.in_features % queries:
        raise ValueError(
            f"queries: needs a number that divides the {head.in_features} inputs of the head; got {queries}."
        )
    probe = AttentivePool(anatomy.width, queries, head.in_features)
    weight = head.weight
    return anatomy, head, probe.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def attach_probe(anatomy: Anatomy, head: nn.Module, probe: AttentivePool) -> None:
    """Puts a probe into the model that it was made for, and freezes all else."""
    anatomy.trunk.requires_grad_(False)
    anatomy.trunk.add_module(NAME, probe.train(anatomy.trunk.training))
    probe.stand_between(anatomy.norm, head)


def add_probe(model: nn.Module, queries: int = 8) -> nn.Module:
    """Puts an attentive probe between a frozen vision model's final norm and its head, in place.

    It pools all final tokens, the class token among them. Only the probe is trained then;
    `train_only(model, "probe")` adds the head.

    Args:
        model: A timm or transformers classifier whose tokens are a sequence.
        queries: Number of queries.

    Returns:
        The same model.

    Raises:
        ValueError: As `make_probe`.
    """
    anatomy, head, probe = make_probe(model, queries)
    model.requires_grad_(False)
    attach_probe(anatomy, head, probe)
    return model


def find_probe(model: nn.Module) -> AttentivePool | None:
    """Returns the attentive probe of a model; None if it has none."""
    return next(iter(find_added(model, AttentivePool)), None)


def remove_probe(model: nn.Module) -> nn.Module:
    """Takes the probe off again; the model then computes what it did, to the bit. It stays frozen.

    Returns:
        The same model.

    Raises:
        ValueError: If it has none.
    """
    remove_added(model, AttentivePool, NAME, "no attentive probe; add_probe adds one")
    return model


def _tokens() -> dict[AttentivePool, Tensor]:
    """Returns the final tokens of the passes that run now, in this thread."""
    if not hasattr(_running, "tokens"):
        _running.tokens = {}
    tokens: dict[AttentivePool, Tensor] = _running.tokens
    return tokens

"""What a method puts into a model: modules that act through hooks, found there and taken out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Added(nn.Module):
    """A module that stands in a model and acts through hooks on the model's own modules.

    Attributes:
        handles: Of its hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def take_off_hooks(self) -> None:
        """Removes its hooks, so that the model computes without it."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


_Kind = TypeVar("_Kind", bound=Added)


def find_added(model: nn.Module, kind: type[_Kind]) -> list[_Kind]:
    """Returns the added modules of a kind, bottom first."""
    return [module for module in model.modules() if isinstance(module, kind)]


def remove_added(model: nn.Module, kind: type[Added], name: str, missing: str) -> list[nn.Module]:
    """Takes all added modules of a kind out; the model then computes what it did, to the bit.

    Args:
        model: The model.
        kind: Their class.
        name: Under which name they, or a list of them, stand in their parents.
        missing: The message for a model that has none, such as `no prompts; add_prompts puts some in`.

    Returns:
        The parents.

    Raises:
        ValueError: If there are none.
    """
    held = [(parent, parent._modules.get(name)) for parent in model.modules()]
    found = [(parent, child) for parent, child in held if child is not None and find_added(child, kind)]
    if not found:
        raise ValueError(f"{type(model).__name__} has {missing}.")
    for parent, child in found:
        for added in find_added(child, kind):
            added.take_off_hooks()
        del parent._modules[name]
    return [parent for parent, _ in found]

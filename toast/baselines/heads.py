"""Where a model's head is, and a new one in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: Attributes of transformers' classifiers that hold the head; a distilled model has two.
HEADS = ("classifier", "score", "cls_classifier", "distillation_classifier")


def heads_of(model: nn.Module, names: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Finds the head: what turns features into classes or tokens.

    Args:
        model: A timm or transformers model.
        names: Paths of the modules that are the head, where it is not what the library says; an empty
            sequence is no head.

    Returns:
        Path -> module. A distilled model has two.

    Raises:
        ValueError: If a path is not there, or the model has no head that is known.
    """
    paths = {module: path for path, module in model.named_modules()}
    if names is not None:
        wanted = [names] if isinstance(names, str) else list(names)
        lacking = [name for name in wanted if name not in paths.values()]
        if lacking:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"head: needs paths of modules of {type(model).__name__}, whose children are {children}; "
                f"got {', '.join(lacking)}."
            )
        return {name: model.get_submodule(name) for name in wanted}
    found = [module for module in _known_heads(model) if any(True for _ in module.parameters())]
    if not found:
        raise ValueError(
            f"head: {type(model).__name__} has none, or one without parameters. Make one with "
            "reset_head(model, classes), or name the modules that are the head."
        )
    return {paths[module]: module for module in found}


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Returns path and module of a model's one head.

    Raises:
        ValueError: If it has none or several.
    """
    heads = heads_of(model)
    if len(heads) > 1:
        raise ValueError(f"head: {type(model).__name__} has several, {', '.join(heads)}; use heads_of.")
    return next(iter(heads.items()))


def reset_head(model: nn.Module, classes: int, zero: bool = False) -> dict[str, nn.Module]:
    """Gives a classifier a new head, in place.

    Args:
        model: A timm or transformers classifier.
        classes: Outputs of the new head.
        zero: Start at zero, where every class is as likely as the others; else as the library starts.

    Returns:
        Path -> module of the new head, on the model's device and in its precision.

    Raises:
        ValueError: If the number is no number of classes, or the head is the vocabulary of a language model.
    """
    if classes < 1:
        raise ValueError(f"classes: needs at least 1; got {classes}.")
    any_model: Any = model
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if hasattr(model, "reset_classifier"):
        any_model.reset_classifier(classes)
    else:
        heads = heads_of(model)
        if _vocabulary(model) in heads.values():
            raise ValueError(
                f"head: that of {type(model).__name__} is the vocabulary and cannot be reset to {classes} "
                "classes; needs a classifier, such as AutoModelForSequenceClassification."
            )
        for path, head in heads.items():
            inner = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
            place = ".".join(part for part in (path, inner[-1]) if part)
            _replace_linear(model, place, classes)
        any_model.config.num_labels = any_model.num_labels = classes
    heads = heads_of(model)
    for head in heads.values():
        head.to(like.device, like.dtype)
        if zero:
            last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
    return heads


def _known_heads(model: nn.Module) -> list[nn.Module]:
    get_classifier = getattr(model, "get_classifier", None)  # timm
    if callable(get_classifier):
        held = get_classifier()
        return list(held) if isinstance(held, tuple) else [held]
    named = [getattr(model, name, None) for name in HEADS]
    found = [module for module in named if isinstance(module, nn.Module)]
    vocabulary = _vocabulary(model)
    return found or ([] if vocabulary is None else [vocabulary])


def _vocabulary(model: nn.Module) -> nn.Module | None:
    """Returns the output embeddings of a language model of transformers."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if callable(get_output_embeddings) else None


def _replace_linear(model: nn.Module, place: str, classes: int) -> None:
    parent, _, leaf = place.rpartition(".")
    old = model.get_submodule(place)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        if old.bias is not None:
            new.bias.zero_()
    setattr(model.get_submodule(parent), leaf, new.train(old.training))

"""What a model, a configuration and a name have to be for an adapter to be put in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from toast.config import ToastConfig
from toast.families.anatomy import Anatomy
from toast.layer import ToastLayer

logger = logging.getLogger(__name__)

#: Heads that PEFT trains by itself once the adapter is in; a model that has none could not be loaded again.
HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def warn_of_second_bias(config: ToastConfig, anatomy: Anatomy) -> None:
    """Says that a model does not start where `init="identity"` otherwise starts it."""
    if config.init == "identity" and config.value_bias == "twice":
        biased = sum(getattr(value, "bias", None) is not None for value in anatomy.values)
        if biased:
            logger.warning(
                "value_bias='twice' adds the bias of %d value projections once more, so the model "
                "differs from the frozen one at the start although init='identity' starts without a signal. "
                "With value_bias='once' it starts at the frozen model.",
                biased,
            )


def refuse_second_wrapping(model: nn.Module, adapter_name: str) -> None:
    """Refuses models that are wrapped already, or that have an adapter of the name."""
    if any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is wrapped by PEFT already; add another adapter with "
            "model.add_adapter(name, config), or remove the first with model.unload()."
        )
    refuse_foreign_adapters(model)
    if any(adapter_name in module.configs for module in model.modules() if isinstance(module, ToastLayer)):
        raise ValueError(
            f"this model has an adapter {adapter_name!r} already, which would be lost; choose another name, "
            "or remove the first with delete_adapter or unload()."
        )


def refuse_names(model: nn.Module, adapter_name: str) -> None:
    """Refuses names that would be lost, or lose others, in the names of tensors and folders."""
    taken = nn.ModuleDict()
    if not adapter_name or adapter_name.startswith("/") or any(mark in adapter_name for mark in ".\\"):
        reason = "it becomes part of the names of tensors and of a folder"
    elif hasattr(taken, adapter_name) or hasattr(nn.ParameterDict(), adapter_name):
        reason = "containers of PyTorch have an attribute of this name"
    else:
        reason = ""
    if reason:
        raise ValueError(
            f"adapter_name: needs text without a dot or a backslash that is no attribute of a container; got "
            f"{adapter_name!r}, and {reason}. Choose another name."
        )


def refuse_clashes(model: nn.Module, adapter_name: str, others: Iterable[str]) -> None:
    """Refuses names of adapters that are also a part of the names of another one's tensors.

    PEFT leaves out of a saved adapter each tensor whose name has another adapter's name as a part.
    """
    for name in _tensor_names(model, adapter_name):
        parts = name.split(".")
        for other in others:
            if other in parts:
                raise ValueError(
                    f"adapter_name: {other!r} is a part of {name!r}, a tensor of adapter {adapter_name!r}, "
                    "which PEFT would therefore leave out when it saves that adapter. Choose another name."
                )


def _tensor_names(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Yields the names of an adapter's tensors, as they are in a `PeftModel`."""
    prefix = "" if isinstance(model, PeftModel) else "base_model.model."
    for name, module in model.named_modules():
        containers: Any = getattr(module, "adapter_layer_names", ()) if isinstance(module, ToastLayer) else ()
        if isinstance(module, ModulesToSaveWrapper):
            containers = ("modules_to_save",)
        if not containers:
            continue
        for tensor, _ in module.named_parameters():
            container, *behind = tensor.split(".")
            if container in containers and behind[0] == adapter_name:
                yield f"{prefix}{name}.{tensor}"


def refuse_unknown_modules(model: nn.Module, config: ToastConfig) -> None:
    """Refuses names that PEFT would ignore; it adds some of its own for classifiers, so one must fit."""
    heads = HEADS.get(config.task_type or "", ())
    wanted = [*(config.modules_to_save or ()), *heads]
    names = [name for name, _ in model.named_modules()]
    if wanted and not any(name.endswith(each) for name in names for each in wanted):
        task = f", which task_type={config.task_type} asks for" if heads else ""
        raise ValueError(
            f"modules_to_save: {type(model).__name__} has no module "
            f"{' or '.join(map(repr, wanted))}{task}; its children are "
            f"{', '.join(name for name, _ in model.named_children())}."
        )


def refuse_steered_modules(anatomy: Anatomy, modules_to_save: list[str] | None) -> None:
    """Refuses to keep modules that are, or hold, what TOAST wraps."""
    for steered in (anatomy.norm_name, *anatomy.value_names):
        parts = steered.split(".")
        holders = [".".join(parts[: end + 1]) for end in range(len(parts))]
        for wanted in modules_to_save or ():
            if any(holder.endswith(wanted) for holder in holders):
                raise ValueError(
                    f"modules_to_save: {wanted!r} is or holds {steered!r}, which TOAST wraps and needs "
                    "frozen. Name other modules, such as the head."
                )


def refuse_foreign_adapters(model: nn.Module) -> None:
    """Refuses bases that carry unmerged adapters of another method."""
    own = {
        id(part) for module in model.modules() if isinstance(module, ToastLayer) for part in module.modules()
    }
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in own:
            raise ValueError(
                "the base model already carries an adapter of another method "
                f"({type(module).__name__} at {name!r}). TOAST needs a plain frozen model: merge that "
                "adapter first (merge_and_unload) or unload it."
            )

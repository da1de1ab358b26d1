"""`toast.wrap`, the one call that makes a frozen model a steered one."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel, TaskType, get_peft_model
from torch import nn

from toast.config import ToastConfig, make_config
from toast.layer import ToastLayer


def wrap(
    model: nn.Module, config: ToastConfig | None = None, adapter_name: str = "default", **options: Any
) -> PeftModel:
    """Wraps a frozen timm or transformers model with TOAST, ready to train.

    Args:
        model: A timm `VisionTransformer`, or a causal language model of transformers. It is changed in place:
            its parameters are frozen, its value projections and its final norm are wrapped.
        config: Configuration of the adapter; None takes the defaults of the model's family.
        adapter_name: Name of the adapter.
        **options: Fields of `ToastConfig`, instead of `config`: `lora_rank=4` is TOAST-Lite,
            `modules_to_save=["head"]` trains the classifier too.

    Returns:
        The `PeftModel`, in the training mode that the model had.

    Raises:
        TypeError: If `model` is no module, or `config` no `ToastConfig`.
        ValueError: If the model is wrapped already or cannot be wrapped, or an option is unknown. The model
            is then as it was.

    Example:
        >>> import timm, toast
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        >>> model = toast.wrap(vit, lora_rank=4, modules_to_save=["head"])
        >>> model.print_trainable_parameters()
        trainable params: 75,850 || all params: 6,486,932 || trainable%: 1.1693
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: needs a torch module to wrap; got {type(model).__name__}.")
    if config is not None and not isinstance(config, ToastConfig):
        raise TypeError(
            f"config: needs a ToastConfig, or None and its fields as options; got {type(config).__name__}. "
            "Use peft.get_peft_model for other methods of PEFT."
        )
    if isinstance(model, PeftModel) or any(isinstance(module, ToastLayer) for module in model.modules()):
        raise ValueError(
            "this model is wrapped already; add another adapter with model.add_adapter(name, config), "
            "or remove the first with model.unload()."
        )
    if config is not None and options:
        raise ValueError(f"pass a config or options, not both; got config and {', '.join(sorted(options))}.")
    if config is None:
        config = make_config(options)
    config = copy.deepcopy(config)
    config.folder = None  # type: ignore[misc] # a new adapter, whatever was saved beside its configuration
    if config.task_type is None and _is_causal_lm(model):
        config.task_type = TaskType.CAUSAL_LM
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    wrapped.training = wrapped.base_model.training = model.training
    return wrapped  # type: ignore[return-value]


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether transformers would generate with the model."""
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())

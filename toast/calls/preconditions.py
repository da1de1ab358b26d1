"""What a wrapped model has to be, at a call, for the call to be steered rightly."""

from __future__ import annotations

from typing import Any

import torch

from toast.adapter import Adapter
from toast.calls.wrapped import WrappedModel
from toast.compiled import COMPILED
from toast.saving.names import is_of_adapter


def check_call(steering: WrappedModel, adapter: Adapter) -> None:
    """Refuses a call whose adapter cannot steer the model as it is now.

    Args:
        steering: The wrapped model's parts.
        adapter: The adapter of the call.

    Raises:
        ValueError: If it cannot.
    """
    _refuse_wrapped_values(steering)
    _refuse_dropped_tokens(steering)
    adapter.refuse_training_fused()


def _refuse_wrapped_values(steering: WrappedModel) -> None:
    """Refuses active adapters of another method around a steered projection: they would not see x + s."""
    for layer, holder, name in steering.places:
        outer: Any = holder._modules[name]
        outer = outer._modules.get(COMPILED, outer)
        merged = getattr(outer, "merged", False)  # into the weight, which is called as any other
        if outer is not layer and not merged and not getattr(outer, "disable_adapters", True):
            active = [name for name in outer.active_adapters if name in outer._get_available_adapters()]
            if active:
                raise ValueError(
                    f"adapter {', '.join(active)} ({type(outer).__name__}) wraps the steered "
                    f"projection {layer.unit.path!r}, so it would act on x and not on "
                    "x + s. Leave that module out of its target_modules, merge it before wrapping, or "
                    "make one of the two active."
                )


def _refuse_dropped_tokens(steering: WrappedModel) -> None:
    """Refuses random token dropping: each pass would drop its own, and signals reach other tokens."""
    rate = getattr(getattr(steering.trunk, "patch_drop", None), "prob", 0.0)
    if steering.trunk.training and rate > 0:
        raise ValueError(
            f"the trunk drops tokens at random in training (patch_drop_rate={rate}), and would drop "
            "different ones in each pass. Create the model with patch_drop_rate=0."
        )


def refuse_trained_below(steering: WrappedModel) -> None:
    """Refuses a stored first pass where its graph would be needed: of what stands before the final norm."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for module_name, module in steering.trunk.named_modules():
        if module is steering.selector:
            return
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}"
            if parameter.requires_grad and not is_of_adapter(path):
                raise ValueError(
                    f"{path.lstrip('.')} is trained, and its gradient comes through the first pass, too; a "
                    "stored one has no graph. Call the model without toast.given_first_pass."
                )

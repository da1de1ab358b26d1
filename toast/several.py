"""`toast.run_adapters`: several tasks of one input, with one first pass for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from toast.mixed import check_alike
from toast.reusing import first_pass, given_first_pass
from toast.steering import Steering, steering_of


def run_adapters(model: nn.Module, adapters: Sequence[str], *inputs: Any, **kwargs: Any) -> dict[str, Any]:
    """Runs a call once for each of several adapters; the first pass, which is the same for all, runs once.

    K adapters cost 1 + K passes in the place of 2 K. Each has its own head, if it was saved with one. For
    samples that name one adapter each, call the model with PEFT's `adapter_names`.

    Args:
        model: A wrapped model in evaluation mode; its active adapter stays as it is.
        adapters: Names of its adapters.
        *inputs: Inputs of the model.
        **kwargs: Further inputs. No key-value cache is kept.

    Returns:
        The output with each adapter, by its name.

    Raises:
        ValueError: If an adapter is not there, two need another first pass, or the call keeps a cache.

    Example:
        >>> import timm, toast, torch
        >>> model = toast.wrap(timm.create_model("vit_tiny_patch16_224"), modules_to_save=["head"]).eval()
        >>> model.add_adapter("birds", toast.ToastConfig(modules_to_save=["head"]))
        >>> found = toast.run_adapters(model, ["default", "birds"], torch.randn(1, 3, 224, 224))
        >>> {name: tuple(logits.shape) for name, logits in found.items()}
        {'default': (1, 1000), 'birds': (1, 1000)}
    """
    steering, _ = steering_of(model, "run_adapters")
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters: needs names of adapters of the model; got {adapters!r}.")
    taken = steering.taken(adapters)
    check_alike(list(taken.values()), "run_adapters")
    _refuse_own_copies_below(steering, adapters)
    with steering.holding(taken[adapters[0]]):
        stored = first_pass(model, *inputs, **kwargs)
    found = {}
    for name, adapter in taken.items():
        with steering.holding(adapter), given_first_pass(model, stored):
            found[name] = model(*inputs, **kwargs)
    return found


def _refuse_own_copies_below(steering: Steering, adapters: Sequence[str]) -> None:
    """Refuses adapters with copies of modules that the first pass runs: each has a first pass of its own."""
    for path, module in steering.trunk.named_modules():
        if module is steering.selector:
            return
        if isinstance(module, ModulesToSaveWrapper) and set(adapters) & set(module.modules_to_save):
            raise ValueError(
                f"run_adapters: {path!r} is in modules_to_save and runs in the first pass, which then is "
                "another for each adapter. Call the model for each."
            )

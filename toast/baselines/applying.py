"""The methods by name: what each puts into a model, and what it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import peft
from torch import nn

from toast.baselines.adaptformer import add_adapters
from toast.baselines.attentive import add_probe
from toast.baselines.freezing import train_only
from toast.baselines.vpt import add_prompts
from toast.families.anatomy import find_anatomy


@dataclass(frozen=True)
class Baseline:
    """How a method is applied.

    Args:
        trains: What `train_only` trains.
        put_in: Puts it into a model first; None adds nothing.
        size: Which argument of `apply_method` says how large it is; None has no size.
        on_text: PEFT's configuration that takes its place on a language model.
    """

    trains: str
    put_in: Callable[..., Any] | None = None
    size: Literal["prompts", "bottleneck"] | None = None
    on_text: type[peft.PromptLearningConfig] | None = None


#: The methods of this package. LoRA and TOAST are PEFT's, as are prompts of language models: at the input
#: alone, or as keys and values of every block.
METHODS = {
    "linear": Baseline("linear"),
    "attentive": Baseline("probe", add_probe),
    "full": Baseline("full"),
    "partial": Baseline("partial"),
    "bias": Baseline("bias"),
    "vpt-shallow": Baseline(
        "prompts", partial(add_prompts, deep=False), "prompts", on_text=peft.PromptTuningConfig
    ),
    "vpt-deep": Baseline(
        "prompts", partial(add_prompts, deep=True), "prompts", on_text=peft.PrefixTuningConfig
    ),
    "adapter": Baseline("adapters", add_adapters, "bottleneck"),
}


def apply_method(
    model: nn.Module,
    name: str,
    *,
    prompts: int = 10,
    bottleneck: int = 64,
    freeze: int = 0,
    head: str | Sequence[str] | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, list[str]]]:
    """Prepares a model for training by a method, in place.

    Args:
        model: A timm or transformers model.
        name: One of `METHODS`.
        prompts: Of `vpt-shallow` and `vpt-deep`: prompts a block.
        bottleneck: Of `adapter`.
        freeze: Of `partial`: how many of the first blocks stay frozen.
        head: Paths of the modules that are the head; None is what the library says. An empty sequence leaves
            the head frozen, but in `full`.
            Prompts of a language model are trained alone, and its `generate` is refused: PEFT's loses them.
        **options: Further arguments of `add_prompts` (for a language model: of PEFT's configuration),
            `add_adapters` or `add_probe`.

    Returns:
        The model, which PEFT wrapped if it is a language model with prompts, and group -> names of its
        trained parameters, as of `train_only`.

    Raises:
        ValueError: If the method or an option is unknown, or does not fit the model.
    """
    if name not in METHODS:
        raise ValueError(f"method: needs one of {', '.join(METHODS)}; got {name!r}.")
    method = METHODS[name]
    if method.on_text is not None and find_anatomy(model).family.kind == "decoder":
        _check_options(name, method.on_text, options)
        config = method.on_text(task_type="CAUSAL_LM", num_virtual_tokens=prompts, **options)
        wrapped = peft.get_peft_model(model, config)
        wrapped.generate = _refuse_generation
        return wrapped, {"prompts": [n for n, p in wrapped.named_parameters() if p.requires_grad]}
    _check_options(name, method.put_in or train_only, options)
    if method.put_in is None:
        return model, train_only(model, method.trains, freeze=freeze, head=head)
    sizes = {None: (), "prompts": (prompts,), "bottleneck": (bottleneck,)}
    method.put_in(model, *sizes[method.size], **options)
    return model, train_only(model, method.trains, head=head)


def _refuse_generation(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "generate: PEFT 0.21 loses prompts and prefixes in the cache of transformers 5, so the text would be "
        "that of another model. Losses and logits are right; to generate, use lora or toast."
    )


#: Arguments that are not options.
_OWN = {
    "model", "what", "freeze", "head", "count", "deep", "bottleneck", "num_virtual_tokens", "task_type",
    "peft_type",
}  # fmt: skip


def _check_options(name: str, target: Callable[..., Any], options: dict[str, Any]) -> None:
    allowed = [option for option in inspect.signature(target).parameters if option not in _OWN]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ValueError(
            f"options of {name}: needs some of {', '.join(allowed) or '(there are none)'}; "
            f"got {', '.join(unknown)}."
        )

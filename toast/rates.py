"""Learning rates: what each group of trained parameters needs, from the one rate that a user knows.

An optimiser of Adam's kind changes every entry of a parameter by about its rate, whatever the gradient's
size. How far that moves what the parameter computes depends on its shape and its place. The table says so for
each group, so that one `learning_rate`, the one that a new head or LoRA would take, does for all groups and
widths.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from toast.layer import ToastLayer
from toast.steering import find_steering
from toast.value import ToastValue

#: Trained parameters by group and name.
Groups = dict[str, dict[str, nn.Parameter]]

#: All inputs as large as the features.
NO_SIZES: Mapping[str, float] = MappingProxyType({})


def _constant(parameter: Tensor) -> float:
    return 1.0


def _by_fan_in(parameter: Tensor) -> float:
    return 1 / parameter.shape[-1]


def _by_length(parameter: Tensor) -> float:
    if parameter.is_meta or not parameter.numel():
        what = "a meta tensor" if parameter.is_meta else "an empty tensor"
        raise ValueError(
            "parameter_groups needs the values of the task embedding, whose length says how fast a step "
            f"turns it; got {what}. Call it when the weights are loaded and before they are sharded, or pass "
            "rates={'task_embedding': ...}."
        )
    length = float(parameter.detach().double().norm())
    return (length or 1.0) / math.sqrt(parameter.numel())


@dataclass(frozen=True)
class Scale:
    """How a group's rate follows from the one of a new head:  rate = learning_rate · factor · by(parameter).

    Args:
        factor: The part that is the same for every model.
        by: The part that is the parameter's.
    """

    factor: float
    by: Callable[[Tensor], float]


#: A map's output changes in a step by up to rate · fan-in · input, all entries of the change pulling
#: together, so the rates of full maps fall as 1 / fan-in. Where the factors come from: docs/rates.md.
SCALES: dict[str, Scale] = {
    # A step turns a direction by rate · √width / length radians: ten learning rates here, 0.03 at 3e-3.
    "task_embedding": Scale(10, _by_length),
    # It starts at zero: what steps make of it is all that there is. At width 192, the learning rate itself.
    "to_signal": Scale(192, _by_fan_in),
    # It starts at the identity, and what is pre-tuned below it reads what it gives: a tenth.
    "channel_transform": Scale(19.2, _by_fan_in),
    # As many in a row as there are blocks, each carrying on the others' changes: a thirtieth.
    "to_state": Scale(6.4, _by_fan_in),
    # Low-rank factors, as of any LoRA: what they add grows with rank and scaling, not with width. Those of
    # `to_state` take the part of it that its full map takes of `to_signal`'s (`_IN_A_ROW`).
    "lora": Scale(1, _constant),
}
_IN_A_ROW = SCALES["to_state"].factor / SCALES["to_signal"].factor
_OTHERS = Scale(1, _constant)

#: Larger inputs count as of the features' size: the best rate is not known more finely, and recipes that
#: were found with them stay as they are. Of a ViT-S/14, the first block's 0.34 needs the lower rate.
_SMALL = 0.375


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    rates: Mapping[str, float] | None = None,
    scaled: bool = True,
    input_sizes: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Returns the groups of an optimiser for all that is trained in a model, each at a rate that suits it.

    TOAST's groups are scaled by width, place and length (`SCALES`, docs/rates.md); a head of
    `modules_to_save`, other adapters and whatever else requires a gradient get the rate as it is.

    The scaling is for optimisers whose step has the size of the rate: Adam and its kin (AdamW, 8-bit ones,
    NAdam, Adafactor with a given rate), and Lion, which takes a third to a tenth of Adam's rate. SGD moves by
    the gradient, and Muon changes a matrix by the same spectral norm at every width: pass `scaled=False`,
    which gives every group the learning rate, as the official recipes for SGD do. Under Muon, pass a lower
    rate for `to_state`, of which many stand in a row, and leave vectors to its Adam.

    Weight decay pulls to zero. Vectors and biases get none; nor do maps that start as the identity
    (`to_state`, `channel_transform` with `init="identity"`), for pulled to zero a dozen of them in a row shut
    the feedback off. `to_signal` and low-rank factors start at zero, where decay pulls towards the frozen
    model, so they get it.

    Low-rank factors take the rate as it is, but a thirtieth of it in `to_state`, as its full maps do compared
    with those of `to_signal`.

    What makes the signal of a block takes steps in proportion to the block's input, if `input_sizes` says
    that this is less than three eighths as large as the features: full maps, and of low-rank factors the
    second, which starts at zero. Language models need it, or a tenth of the rate.

    Args:
        model: A wrapped model, maybe wrapped again by DDP or `torch.compile`, or any other module.
        learning_rate: The rate that a new head or LoRA would take, such as 1e-3.
        weight_decay: Of the parameters that get it.
        rates: Rates of single groups as they are, not scaled: `task_embedding`, `channel_transform`,
            `to_state`, `to_signal`, `lora`, `head` (`modules_to_save`), `adapter` (everything else).
        scaled: Whether TOAST's groups are scaled.
        input_sizes: What `toast.input_sizes` measured; None takes all blocks' inputs to be as large as the
            features.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and `name`, for any optimiser of PyTorch's form. A
        group of the same name comes twice where parts of it differ in rate or decay.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If nothing is trained, a number is out of its range, or `rates` names a group that is not
            trained.

    Example:
        >>> import timm, toast, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        >>> model = toast.wrap(vit, modules_to_save=["head"])
        >>> optimizer = torch.optim.AdamW(toast.parameter_groups(model, 1e-3))
        >>> [(group["name"], round(group["lr"], 7)) for group in optimizer.param_groups][-2:]
        [('head', 0.001), ('head', 0.001)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: needs a torch module; got {type(model).__name__}.")
    groups = trained_groups(model)
    if not groups:
        raise ValueError(
            "parameter_groups needs a model with trained parameters; none of this one's requires a gradient. "
            "Wrap it with toast.wrap, or load its adapter with is_trainable=True."
        )
    steering = find_steering(model)
    if scaled and input_sizes is None and steering is not None and steering.family.kind == "decoder":
        warnings.warn(
            "parameter_groups: blocks of language models have small inputs, and the rates of a new head "
            "diverge there. Pass input_sizes=toast.input_sizes(model, **batch), by which they are lowered; "
            "or input_sizes={}, if the learning rate is low enough.",
            stacklevel=2,
        )
    return optimizer_groups(
        model, groups, learning_rate, weight_decay=weight_decay, rates=rates or {}, scaled=scaled,
        input_sizes=input_sizes or NO_SIZES,
    )  # fmt: skip


def trained_groups(model: nn.Module, named: Mapping[str, str] | None = None) -> Groups:
    """Returns every trained parameter of a model by group and name.

    Args:
        model: The model.
        named: Groups of parameters by name, for methods that have groups of their own.

    Returns:
        TOAST's groups, those of `named`, `head` for modules that PEFT saves beside an adapter, and `adapter`.
    """
    group_of = {id(parameter): group for layer, adapter in _adapters(model)
                for group, parameter in layer.groups(adapter)}  # fmt: skip
    groups: Groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = "head" if ".modules_to_save." in name else "adapter"
            group = group_of.get(id(parameter)) or (named or {}).get(name) or kept
            groups.setdefault(group, {})[name] = parameter
    return groups


def optimizer_groups(
    model: nn.Module,
    groups: Groups,
    learning_rate: float,
    *,
    weight_decay: float,
    rates: Mapping[str, float],
    scaled: bool = True,
    input_sizes: Mapping[str, float] = NO_SIZES,
) -> list[dict[str, Any]]:
    """Returns the groups of an optimiser from what is trained by group; see `parameter_groups`.

    Raises:
        ValueError: If a number is out of its range, or `rates` names a group that is not trained.
    """
    _check(learning_rate, weight_decay, rates, groups)
    shares = dict(_shares(model, input_sizes)) if scaled else {}
    identities = {id(parameter) for parameter in _identities(model)}
    found: dict[tuple[str, float, float], dict[str, Any]] = {}
    for group, parameters in groups.items():
        scale = SCALES.get(group, _OTHERS) if scaled else _OTHERS
        for parameter in parameters.values():
            rate = rates.get(group)
            if rate is None:
                rate = learning_rate * scale.factor * scale.by(parameter) * shares.get(id(parameter), 1.0)
            decay = weight_decay if parameter.ndim > 1 and id(parameter) not in identities else 0.0
            part = {"params": [], "lr": float(rate), "weight_decay": decay, "name": group}
            found.setdefault((group, float(rate), decay), part)["params"].append(parameter)
    return list(found.values())


def _adapters(model: nn.Module) -> Iterator[tuple[ToastLayer, str]]:
    for module in model.modules():
        if isinstance(module, ToastLayer):
            for adapter in module.configs:
                yield module, adapter


def _identities(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the maps that start as the identity, or between unlike blocks as an isometry."""
    for layer, adapter in _adapters(model):
        if layer.configs[adapter].init == "identity":
            for group, parameter in layer.groups(adapter):
                if group in ("to_state", "channel_transform"):
                    yield parameter


def _shares(model: nn.Module, input_sizes: Mapping[str, float]) -> Iterator[tuple[int, float]]:
    """Yields, by id of a parameter of the feedback, the share of its group's rate that its place allows.

    What makes a block's signal follows the block's input; low-rank factors between blocks stand in a row.

    Raises:
        ValueError: If a size is no positive number, or of no block of the model.
    """
    units = {layer.unit.name for layer, _ in _adapters(model) if isinstance(layer, ToastValue)}
    for name, size in input_sizes.items():
        if name not in units:
            raise ValueError(
                f"input_sizes: {name!r} is no steered value projection of this model. Needs what "
                "toast.input_sizes(model, inputs) returns for it."
            )
        if not _is_number(size) or not 0 < size < math.inf:
            raise ValueError(f"input_sizes[{name!r}]: needs a number above 0; got {size!r}.")
    for layer, adapter in _adapters(model):
        if isinstance(layer, ToastValue):
            size = input_sizes.get(layer.unit.name, 1.0)
            share = size if size < _SMALL else 1.0
            for name, parameter in layer.toast_to_signal[adapter].named_parameters():
                # The first factor starts at random: its step is one relative to itself.
                yield id(parameter), 1.0 if "lora_A" in name else share
            for name, parameter in layer.toast_to_state[adapter].named_parameters():
                yield id(parameter), _IN_A_ROW if "lora_" in name else 1.0


def _check(
    learning_rate: object, weight_decay: object, rates: Mapping[str, float], groups: Mapping[str, Any]
) -> None:
    unknown = sorted(set(rates) - set(groups))
    if unknown:
        raise ValueError(
            f"rates: no parameters are trained in {', '.join(unknown)}; the trained groups are "
            f"{', '.join(groups)}."
        )
    numbers = {"learning_rate": learning_rate} | {f"rates[{name!r}]": rate for name, rate in rates.items()}
    for name, value in numbers.items():
        if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name}: needs a number above 0, such as 1e-3; got {value!r}.")
    if not _is_number(weight_decay) or not 0 <= weight_decay < math.inf:  # type: ignore[operator]
        raise ValueError(f"weight_decay: needs 0 or a positive number; got {weight_decay!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

"""The two forms of the feedback path compute the same, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import toast
from tests.models import awaken, decoder, images, tokens, vit
from toast.feedback import composing_pays, feed_back
from toast.signals import ComposedSignal
from toast.steering import find_steering


def outcome(model, form: str, *inputs: Tensor, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a call in one form, and the gradient of its sum of squares for every parameter."""
    find_steering(model).selector.configs["default"].feedback_form = form
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*inputs)
        output = getattr(output, "logits", output)
    output.float().square().mean().backward() if autocast else output.square().mean().backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


CASES = {
    "vit": lambda **options: (toast.wrap(vit(), **options), images()),
    "vit-no-bias": lambda **options: (toast.wrap(vit("no-value-bias"), **options), images()),
    "llama": lambda **options: (toast.wrap(decoder("llama"), **options), tokens()),
    "grouped": lambda **options: (toast.wrap(decoder("llama-grouped"), **options), tokens()),
    "gpt2": lambda **options: (toast.wrap(decoder("gpt2"), **options), tokens()),
}


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"value_bias": "twice"}], ids=["full", "lite", "twice"]
)
@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_equal_in_float64(name: str, options: dict) -> None:
    model, inputs = CASES[name](train="all", **options)
    awaken(model)
    output, gradients = outcome(model, "per_token", inputs)
    composed, composed_gradients = outcome(model, "composed", inputs)
    torch.testing.assert_close(composed, output, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == composed_gradients.keys()
    assert len(gradients) == 2 + 6 * (3 if "lora_rank" in options else 1)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(composed_gradients[parameter], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_both_forms_are_equal_within_rounding(autocast: bool) -> None:
    model, inputs = awaken(toast.wrap(vit().float()), scale=0.15), images().float()
    output, gradients = outcome(model, "per_token", inputs, autocast=autocast)
    composed, composed_gradients = outcome(model, "composed", inputs, autocast=autocast)
    tolerance = 3e-2 if autocast else 1e-5
    assert (composed - output).abs().max() <= tolerance * output.abs().max()
    for parameter, gradient in gradients.items():
        error = (composed_gradients[parameter] - gradient).norm()
        assert error <= 2 * tolerance * gradient.norm(), parameter


def test_the_cheaper_form_is_taken() -> None:
    steering = find_steering(toast.wrap(vit()))
    adapter = steering.adapter
    maps = adapter.maps
    few, many = (
        steering.selector.select(adapter, None, torch.randn(*size, 24).double()) for size in ((1, 1), (8, 17))
    )
    assert not composing_pays(maps, 36) and composing_pays(maps, 37)  # fused: from 1.5 widths of tokens
    assert all(isinstance(signal, Tensor) for signal in feed_back(adapter, few).values())
    assert all(isinstance(signal, ComposedSignal) for signal in feed_back(adapter, many).values())
    separate = find_steering(toast.wrap(decoder("llama"))).adapter.maps
    assert not composing_pays(separate, 72) and composing_pays(separate, 73)  # separate: from 3 widths


def test_composing_is_refused_where_it_cannot_be() -> None:
    model = toast.wrap(vit(), lora_rank=2, lora_dropout=0.5, feedback_form="composed").train()
    with pytest.raises(ValueError, match="plain weights, and no LoRA dropout"):
        model(images())
    model.eval()(images())


def test_the_signals_of_a_trace_are_those_of_the_equations() -> None:
    model = awaken(toast.wrap(vit(), feedback_form="composed"))
    traced = toast.trace(model, images())
    state = traced.selected
    for value, signal in zip(reversed(find_steering(model).values), reversed(traced.signals), strict=True):
        state = state @ value.toast_to_state["default"].weight.T
        torch.testing.assert_close(signal, state @ value.toast_to_signal["default"].weight.T)

"""Gradients against finite differences, wherever something trained enters the model; and of higher order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import toast
from tests.models import images, tokens
from tests.steered import assert_same, steered, trained
from toast.signals import Selection

OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "upper": {"steer_from": 1},
    "read-below": {"select_from": 1},
    "composed": {"feedback_form": "composed"},
    "lite": {"lora_rank": 2, "feedback_form": "per_token"},
}
cases = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def slope(loss: Callable[[], Tensor], at: Tensor, along: Tensor, step: float) -> float:
    """The derivative of a loss along a direction, by central differences."""
    ends = []
    for sign in (1, -1):
        at.data.add_(sign * step * along)
        ends.append(loss().item())
        at.data.sub_(sign * step * along)
    return (ends[0] - ends[1]) / (2 * step)


def assert_right(loss: Callable[[], Tensor], at: Tensor, single: bool = False) -> None:
    """Llama's norms compute in single precision, which takes larger steps."""
    step, digits = (1e-4, 5e-3) if single else (1e-6, 1e-5)
    (gradient,) = torch.autograd.grad(loss(), [at])
    for _ in range(2):
        along = torch.randn_like(at)
        expected = slope(loss, at, along, step)
        assert (gradient * along).sum().item() == pytest.approx(expected, rel=digits, abs=digits * 1e-3)


# Every way into the trunk.


@cases
def test_of_pictures(options: dict[str, Any]) -> None:
    model, x = steered("vit", **options), images(2).requires_grad_()
    assert_right(lambda: model(x).square().mean(), x)


@cases
def test_of_a_prompt_of_pixels(options: dict[str, Any]) -> None:
    model, x = steered("vit", **options), images(2)
    prompt = nn.Parameter(torch.zeros(3, 16, 16, dtype=torch.float64))
    assert_right(lambda: model(x + prompt).square().mean(), prompt)


@cases
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_embeddings(kind: str, options: dict[str, Any]) -> None:
    model, text = steered(kind, **options), tokens(2)
    embeddings = model.get_input_embeddings()(text).detach().requires_grad_()
    assert_right(
        lambda: model(inputs_embeds=embeddings, use_cache=False).logits.square().mean(),
        embeddings,
        single=kind == "llama",
    )


@cases
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_of_a_tensor_that_a_hook_adds(kind: str, options: dict[str, Any]) -> None:
    model = steered(kind, **options)
    added = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    bare = model.get_base_model()
    entrance = bare.patch_embed if kind == "vit" else bare.get_input_embeddings()
    entrance.register_forward_hook(lambda module, args, out: out + added)
    x = images(2) if kind == "vit" else tokens(2)
    assert_right(
        lambda: (model(x) if kind == "vit" else model(input_ids=x, use_cache=False).logits).square().mean(),
        added,
        single=kind == "llama",
    )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_of_lora_beside() -> None:
    model, x = steered("vit"), images(2)
    inject_adapter_in_model(
        LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False), model.get_base_model()
    )
    factors = [p.requires_grad_() for name, p in model.named_parameters() if "lora_A" in name]
    model.double()
    for factor in factors:
        assert_right(lambda: model(x).square().mean(), factor)


def test_nothing_is_kept_of_a_frozen_first_pass() -> None:
    for kind in ("vit", "llama"):
        model = steered(kind).train()
        (features,) = [toast.trace(model, **call).features for call in (_call(kind),)]
        assert not features.requires_grad
        assert toast.trace(model, **_call(kind)).output is not None


def _call(kind: str) -> dict[str, Any]:
    return {"x": images(2)} if kind == "vit" else {"input_ids": tokens(2), "use_cache": False}


def test_embeddings_that_require_a_gradient_for_checkpointing_cost_no_first_graph() -> None:
    """`Trainer` and PEFT let embeddings require one, which nobody reads."""
    model, call = steered("llama").train(), _call("llama")
    expected = torch.autograd.grad(model(**call).logits.square().mean(), list(trained(model).values()))
    bare = model.get_base_model()
    bare.enable_input_require_grads()
    traced = toast.trace(model, **call)
    assert traced.output.logits.requires_grad
    assert not traced.features.requires_grad
    found = torch.autograd.grad(model(**call).logits.square().mean(), list(trained(model).values()))
    assert_same(found, expected)
    seen: list[bool] = []
    bare.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.requires_grad)
    )
    model(**call)
    assert seen == [False, True]  # the hook itself went on in the second pass
    bare.disable_input_require_grads()
    model(**call)
    assert seen[2:] == [False, False]


def test_a_stored_first_pass_is_refused_where_its_gradient_is_needed() -> None:
    model, x = steered("vit"), images(2)
    stored = toast.first_pass(model, x)
    with toast.given_first_pass(model, stored):
        with pytest.raises(ValueError, match="the inputs require a gradient"):
            model(x.clone().requires_grad_())
        with torch.no_grad():
            model(x.clone().requires_grad_())


def test_a_stored_first_pass_is_refused_where_something_below_is_trained() -> None:
    x = images(2)
    for kept, refused in (("patch_embed", True), ("blocks.2.mlp", True), ("head", False)):
        model = steered("vit", modules_to_save=[kept]).train()
        stored = toast.first_pass(model, x)
        with toast.given_first_pass(model, stored):
            if refused:
                with pytest.raises(ValueError, match=f"{kept}.*is trained, and its gradient comes through"):
                    model(x)
            else:
                model(x).sum().backward()


# Higher orders and transforms, in both forms of the feedback.

forms = pytest.mark.parametrize("form", ["per_token", "composed"])


def loss_of(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: functional_call(model, weights, (x,)).square().mean()


@forms
def test_of_second_order(form: str) -> None:
    model, x = steered("vit", feedback_form=form), images(2)
    weights = trained(model)

    @sdpa_kernel(SDPBackend.MATH)  # the fused kernels have no second derivative
    def penalty() -> Tensor:
        gradients = torch.autograd.grad(model(x).square().mean(), list(weights.values()), create_graph=True)
        return sum(g.square().sum() for g in gradients)  # type: ignore[return-value]

    for name in ("task_embedding", "channel_transform", "blocks.1.attn.qkv.toast_to_state"):
        (parameter,) = [p for path, p in weights.items() if name in path]
        assert_right(penalty, parameter)
    with sdpa_kernel(SDPBackend.MATH):
        penalty().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in weights.values())


@forms
@sdpa_kernel(SDPBackend.MATH)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:There is a performance drop")
def test_transforms_of_torch_func(form: str) -> None:
    model, x = steered("vit", feedback_form=form), images(4)
    weights = {name: p.detach() for name, p in trained(model).items()}
    expected = torch.autograd.grad(model(x).square().mean(), list(trained(model).values()))
    found = torch.func.grad(loss_of(model, x))(weights)
    assert_same(list(found.values()), list(expected))

    along = {name: torch.randn_like(w) for name, w in weights.items()}
    _, forward = torch.func.jvp(loss_of(model, x), (weights,), (along,))
    sideways = sum((g * along[name]).sum() for name, g in found.items())
    torch.testing.assert_close(forward, sideways)

    # by sample, and over several adapters at once
    one = torch.func.vmap(lambda each: torch.func.grad(loss_of(model, each[None]))(weights))(x)
    for index in range(len(x)):
        alone = torch.func.grad(loss_of(model, x[index : index + 1]))(weights)
        assert_same([g[index] for g in one.values()], list(alone.values()))
    several = {name: torch.stack([w, 1.1 * w]) for name, w in weights.items()}
    both = torch.func.vmap(lambda each: functional_call(model, each, (x,)))(several)
    for index, out in enumerate(both):
        expected_out = functional_call(model, {name: w[index] for name, w in several.items()}, (x,))
        torch.testing.assert_close(out, expected_out)


@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-8])
def test_of_small_weights_in_half_precision(size: float) -> None:
    features, matrix = torch.randn(2, 9, 24), torch.randn(24, 24).half().float()
    features = features.half().float()
    weights = (torch.rand(2, 9) * size).requires_grad_()
    into = torch.randn(2, 9, 24).half()

    def gradient(dtype: torch.dtype) -> Tensor:
        out = Selection(features.to(dtype), weights, matrix).product(matrix.to(dtype))
        return torch.autograd.grad(out, weights, into.to(dtype))[0]

    exact = gradient(torch.float64)
    assert (gradient(torch.float16) - exact).norm() <= 2e-3 * exact.norm()

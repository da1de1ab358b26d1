"""Gradients, precision and early ends of the two passes, and every way to call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toast
from tests.models import DEPTH, decoder, images, vit
from tests.steered import (
    MODELS,
    assert_same,
    blocks_of,
    call,
    inputs,
    steer,
    steered,
    trained,
)
from toast.steering import find_steering

# Every way to call a ViT.


def test_all_methods_of_a_vit_are_steered_alike() -> None:
    model, (x,) = steered("vit"), inputs("vit")
    backbone = model.base_model.model
    features = backbone.forward_features(x)
    assert_same(backbone.forward_head(features), model(x))
    last, between = backbone.forward_intermediates(x, norm=True, output_fmt="NLC")
    assert_same(last, features)
    assert_same(between[-1], features[:, 1:])
    assert_same(backbone.get_intermediate_layers(x, n=1, norm=True)[0], features[:, 1:])
    states = toast.trace(model, x, block_states=True).states
    early = backbone.forward_intermediates(
        x, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    assert_same(early[0], states[0][1][:, 1:])
    with model.disable_adapter():
        assert (backbone.forward_features(x) - features).abs().max() > 1e-2


# Gradients by another way.


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lite"])
@pytest.mark.parametrize("features", ["normed", "unnormed", "mixed"])
def test_gradients_are_those_of_finite_differences(features: str, options: dict[str, Any]) -> None:
    options = options | {"train": "all"}
    model, (x,) = steered("vit", select_features=features, **options), inputs("vit")

    def loss() -> Tensor:
        return call(model, x).square().mean()

    found = dict(zip(trained(model), torch.autograd.grad(loss(), list(trained(model).values())), strict=True))
    step = 1e-5
    groups = {
        group: parameter
        for layer in (find_steering(model).selector, *find_steering(model).values)
        for group, parameter in layer.groups("default")
    }
    assert groups.keys() == set(toast.ToastConfig(**options).trained_groups)
    for group, parameter in groups.items():
        gradient = next(found[name] for name, p in trained(model).items() if p is parameter)
        flat = parameter.data.view(-1)
        for index in gradient.abs().flatten().topk(3).indices:
            kept, losses = flat[index].item(), []
            with torch.no_grad():
                for shift in (step, -step):
                    flat[index] = kept + shift
                    losses.append(loss().item())
                flat[index] = kept
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-9), group


# Precision.


@pytest.mark.parametrize("kind", MODELS)
def test_inference_mode_gives_the_same_output(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    with torch.inference_mode():
        found = call(model, x)
    assert torch.equal(found, call(model, x))


@pytest.mark.parametrize("saved", [["head"], ["head", "patch_embed"]])
def test_autocast_keeps_every_gradient(saved: list[str]) -> None:
    """A weight that the first pass casts without a graph must not be what the second pass uses."""
    model = steered("vit", modules_to_save=saved).float().train()
    x = images().float()

    def run(cache: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = call(model, x).float().square().mean()
        found = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)
        return {name: g for name, g in zip(trained(model), found, strict=True) if g is not None}

    with_cache, without = run(True), run(False)
    assert with_cache.keys() == without.keys() == trained(model).keys()
    for name, gradient in with_cache.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, without[name]), name


# A first pass that ends early.


@pytest.mark.parametrize("select_from", range(DEPTH))
@pytest.mark.parametrize("features", ["normed", "unnormed"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_early_end_reads_what_leaves_its_block(kind: str, features: str, select_from: int) -> None:
    bare, (x,) = vit() if kind == "vit" else decoder(kind), inputs(kind)
    left: list[Tensor] = []

    def keep(block: nn.Module, args: Any, out: Any) -> None:
        left.append(out[0] if isinstance(out, tuple) else out)

    blocks = bare.blocks if kind == "vit" else bare.transformer.h if kind == "gpt2" else bare.model.layers
    handle = blocks[select_from].register_forward_hook(keep)
    call(bare, x)
    handle.remove()
    norm = bare.norm if kind == "vit" else bare.transformer.ln_f if kind == "gpt2" else bare.model.norm
    expected = norm(left[0]) if features == "normed" else left[0]
    model = steer(bare, kind, select_from=select_from, select_features=features)
    ran: list[int] = []
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    traced = toast.trace(model, **{"x" if kind == "vit" else "input_ids": x})
    assert torch.equal(traced.features, expected)
    assert ran == [*range(select_from + 1), *range(DEPTH)]


def test_tokens_that_are_dropped_at_random_are_refused_in_training() -> None:
    model = toast.wrap(vit(patch_drop_rate=0.5))
    model(images())
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.5"):
        model.train()(images())


def test_what_is_trained_beside_has_the_gradient_of_both_passes() -> None:
    model = steer(vit(), "vit", modules_to_save=["patch_embed"])
    (x,) = inputs("vit")
    bias = model.get_base_model().patch_embed.modules_to_save["default"].proj.bias
    (gradient,) = torch.autograd.grad(call(model, x).square().mean(), bias)
    step = 1e-5
    with torch.no_grad():
        for channel in (0, 7, 20):
            around = []
            for sign in (1, -1):
                bias[channel] += sign * step
                around.append(call(model, x).square().mean())
                bias[channel] -= sign * step
            slope = (around[0] - around[1]) / (2 * step)
            assert gradient[channel] == pytest.approx(slope.item(), rel=1e-5)


def test_a_frozen_trunk_keeps_no_graph_of_the_first_pass() -> None:
    traced = toast.trace(steered("vit"), *inputs("vit"))
    assert not traced.features.requires_grad
    assert traced.output.requires_grad


@pytest.mark.parametrize("form", ["per_token", "composed"])
def test_a_hook_on_a_projection_may_hold_on_to_its_output(form: str) -> None:
    model = steered("vit", feedback_form=form)
    seen: list[Tensor] = []
    inner = find_steering(model).values[1].base_layer
    (x,) = inputs("vit")
    expected = call(model, x)
    handle = inner.register_forward_hook(lambda module, args, out: seen.append(out))
    output = call(model, x)
    torch.testing.assert_close(output, expected)
    (output.square().mean() + seen[-1].square().mean()).backward()
    handle.remove()
    assert seen[-1].shape[-1] == 3 * 24

"""Sizes of what enters the value projections, and the rates that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import toast
from tests.models import DEPTH, decoder, images, tokens, vit
from toast import embedded
from toast.steering import find_steering

RATE = 1e-3


def size(x: Tensor) -> float:
    return float(x.pow(2).mean(-1).sqrt().flatten().median())


def by_hand(bare: nn.Module, projections: list[str], norm: str, *inputs: Any, **kwargs: Any) -> list[float]:
    """The same ratios, from a model that was never wrapped."""
    seen: dict[str, float] = {}
    for name in projections:
        bare.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, size(args[0]))
        )
    bare.get_submodule(norm).register_forward_hook(lambda _, args, out: seen.__setitem__(norm, size(out)))
    with torch.no_grad():
        bare(*inputs, **kwargs)
    return [seen[name] / seen[norm] for name in projections]


def rates(model: nn.Module, sizes: dict[str, float]) -> dict[int, float]:
    """Returns the rate of every trained parameter, by id."""
    parts = toast.parameter_groups(model, RATE, input_sizes=sizes)
    return {id(parameter): part["lr"] for part in parts for parameter in part["params"]}


def test_sizes_are_those_of_the_plain_model() -> None:
    model = toast.wrap(vit())
    for parameter in model.parameters():  # what was trained does not matter
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    names = [f"blocks.{i}.attn.qkv" for i in range(DEPTH)]
    found = toast.input_sizes(model, x := images())
    expected = by_hand(model.unload(), names, "norm", x)
    assert list(found) == names
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"steer_from": 1}, {"select_from": 1}, {"lora_rank": 2}])
def test_every_steered_block_has_a_size(options: dict[str, Any]) -> None:
    model = toast.wrap(decoder(), **options)
    found = toast.input_sizes(model, tokens(), use_cache=False)
    assert len(found) == len(find_steering(model).values)
    assert all(size > 0 for size in found.values())


def test_a_signal_takes_steps_in_proportion_to_the_input_it_is_added_to() -> None:
    bare = decoder()
    with torch.no_grad():  # a language model whose norms scale the inputs of the blocks down
        for share, block in zip((0.01, 0.17, 1.0), bare.model.layers, strict=True):
            block.input_layernorm.weight.fill_(share)
        bare.model.norm.weight.fill_(0.5)
    for options in ({}, {"lora_rank": 2}):
        model = toast.wrap(bare, **options)
        sizes = toast.input_sizes(model, tokens(), use_cache=False)
        assert list(sizes.values()) == pytest.approx([0.02, 0.34, 2.0], rel=1e-3)
        rate = {
            id(p): g["lr"]
            for g in toast.parameter_groups(model, RATE, input_sizes=sizes)
            for p in g["params"]
        }
        whole = {
            id(p): g["lr"] for g in toast.parameter_groups(model, RATE, input_sizes={}) for p in g["params"]
        }
        for layer, share in zip(find_steering(model).values, (0.02, 0.34, 1.0), strict=True):  # never raised
            for name, parameter in layer.toast_to_signal["default"].named_parameters():
                if parameter.requires_grad:
                    expected = 1.0 if "lora_A" in name else share
                    assert rate.pop(id(parameter)) == pytest.approx(expected * whole[id(parameter)], rel=1e-3)
        assert rate == {each: whole[each] for each in rate}  # all others are as they were
        bare = model.unload()


@pytest.mark.parametrize("options", [{}, {"select_from": 9}])
def test_recipes_of_the_embedded_backbone_keep_their_rates(options: dict[str, Any]) -> None:
    model = toast.wrap(embedded.load_backbone().eval(), **options)
    for pictures in (embedded.load_generic(4), embedded.load_task(4, 4)[0]):
        sizes = toast.input_sizes(model, embedded.normalise(pictures.images))
        assert rates(model, sizes) == rates(model, {})


def test_language_models_are_warned_of() -> None:
    model = toast.wrap(decoder())
    with pytest.warns(UserWarning, match=r"input_sizes=toast\.input_sizes"):
        toast.parameter_groups(model, RATE)
    toast.parameter_groups(model, RATE, scaled=False)
    toast.parameter_groups(toast.wrap(vit()), RATE)


def test_attentions_that_multiply_by_themselves_have_no_size() -> None:
    beit = timm.create_model(
        "beit_base_patch16_224", pretrained=False, img_size=32, embed_dim=24, depth=2, num_heads=3
    ).eval()
    model = toast.wrap(beit)
    assert toast.input_sizes(model, torch.randn(1, 3, 32, 32)) == {}
    assert toast.parameter_groups(model, RATE, input_sizes={})


def test_what_does_not_fit_is_refused() -> None:
    model = toast.wrap(vit())
    with pytest.raises(ValueError, match=r"'blocks.7.attn.qkv' is no steered value projection"):
        toast.parameter_groups(model, RATE, input_sizes={"blocks.7.attn.qkv": 1.0})
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv'\]: needs a number above 0"):
        toast.parameter_groups(model, RATE, input_sizes={"blocks.0.attn.qkv": 0})
    with torch.no_grad():
        model.get_submodule("base_model.model.blocks.1.norm1").weight.zero_()
        model.get_submodule("base_model.model.blocks.1.norm1").bias.zero_()
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv has 0"):
        toast.input_sizes(model, images())

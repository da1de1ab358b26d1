"""Visual prompts against a loop over the blocks that concatenates them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.models import DEPTH, VITS, WIDTH, decoder, images, vit
from toast.baselines.freezing import train_only
from toast.baselines.vpt import add_prompts, find_prompts, remove_prompts
from toast.tracing import AttentionMode

COUNT = 4


def frozen(kind: str = "class-token") -> Any:
    return vit(kind).requires_grad_(False)


def direct(model: Any, x: Tensor, prompts: Tensor, behind_prefix: bool) -> Tensor:
    """Deep with as many rows as blocks, shallow with one; at the paper's place or at the end."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    tokens = x.shape[1]
    place = model.num_prefix_tokens if behind_prefix else tokens
    for index, block in enumerate(model.blocks):
        if index == 0:
            x = torch.cat([x[:, :place], prompts[0].expand(len(x), -1, -1), x[:, place:]], 1)
        elif len(prompts) > 1:
            after = x[:, place + COUNT :]
            x = torch.cat([x[:, :place], prompts[index].expand(len(x), -1, -1), after], 1)
        x = block(x)
    x = torch.cat([x[:, :place], x[:, place + COUNT :]], 1)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("kind", VITS)
def test_a_loop_over_the_blocks_computes_the_same(kind: str, deep: bool) -> None:
    plain, x = frozen(kind), images(2)
    model = add_prompts(copy.deepcopy(plain), COUNT, deep)
    tokens = find_prompts(model).tokens
    assert tokens.shape == (DEPTH if deep else 1, COUNT, WIDTH)
    nn.init.normal_(tokens)
    found = model(x)
    for behind_prefix in (False, True):
        torch.testing.assert_close(found, direct(plain, x, tokens, behind_prefix), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, plain(x), atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "vit", "deit", "dinov2", "clip-vision", "siglip-vision", "timm-deit-distilled",
        "timm-vit-parallel-scaling", "timm-vit-parallel-things", "timm-cait",
    ],
)  # fmt: skip
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_families_keep_shape_and_get_gradients(name: str, deep: bool) -> None:
    model, x = zoo.build(name).requires_grad_(False), zoo.example(name)

    def call() -> Tensor:
        out = model(**x)
        return out if isinstance(out, Tensor) else out[0]

    before = call()
    add_prompts(model, COUNT, deep)
    after = call()
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    after.square().sum().backward()
    assert find_prompts(model).tokens.grad.abs().sum((1, 2)).gt(0).all()
    remove_prompts(model)
    assert torch.equal(call(), before)


def test_transformers_loop_over_the_blocks_computes_the_same() -> None:
    plain, x = zoo.build("dinov2").requires_grad_(False), zoo.example("dinov2")
    model = add_prompts(copy.deepcopy(plain), COUNT, deep=True)
    trunk = plain.dinov2
    hidden = trunk.embeddings(x["pixel_values"])
    length = hidden.shape[1]
    for layer, prompts in zip(trunk.encoder.layer, find_prompts(model).tokens, strict=True):
        hidden = layer(torch.cat([hidden, prompts.expand(len(hidden), -1, -1)], 1))[:, :length]
    hidden = trunk.layernorm(hidden)
    features = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)
    torch.testing.assert_close(model(**x).logits, plain.classifier(features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_gradients_reach_prompts_alone_and_checkpointing_keeps_them(deep: bool) -> None:
    model, x = add_prompts(vit(), COUNT, deep), images(2)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompts.tokens"]
    model(x).square().sum().backward()
    tokens = find_prompts(model).tokens
    expected, tokens.grad = tokens.grad, None
    assert expected.abs().sum((1, 2)).gt(0).all()
    model.set_grad_checkpointing(True)
    model.train()(x).square().sum().backward()
    torch.testing.assert_close(tokens.grad, expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for n, p in model.named_parameters() if n != "prompts.tokens")


def test_the_head_can_be_trained_too() -> None:
    model = add_prompts(vit(), COUNT, deep=True)
    assert train_only(model, "prompts") == {
        "prompts": ["prompts.tokens"],
        "head": ["head.weight", "head.bias"],
    }
    model(images(2)).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "prompts.tokens",
        "head.weight",
        "head.bias",
    }


def test_removing_restores_the_bits() -> None:
    model, x = frozen("registers-layer-scale"), images(2)
    before, names, blocks = model(x), list(model.state_dict()), list(model.blocks)
    add_prompts(model, COUNT, deep=False)
    assert list(model.blocks) == blocks
    assert not torch.equal(model(x), before)
    remove_prompts(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    model.forward_intermediates(x)
    with pytest.raises(ValueError, match="VisionTransformer has no prompts"):
        remove_prompts(model)


def test_a_copy_has_prompts_of_its_own() -> None:
    model, x = add_prompts(frozen(), COUNT, deep=True), images(2)
    before, twin = model(x), copy.deepcopy(model)
    nn.init.normal_(find_prompts(twin).tokens, std=3)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    plain = remove_prompts(twin)(x)
    assert torch.equal(model(x), before)
    assert torch.equal(plain, frozen_like(model)(x))


def frozen_like(model: nn.Module) -> nn.Module:
    twin = frozen()
    state = {name: tensor for name, tensor in model.state_dict().items() if "prompts" not in name}
    twin.load_state_dict(state)
    return twin


def test_state_dict_moves_to_another_model() -> None:
    model, x = add_prompts(vit(), COUNT, deep=True), images(2)
    other = add_prompts(vit(), COUNT, deep=True)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_only_attention_knows_of_the_prompts(deep: bool) -> None:
    model, x = frozen(), images(2)
    seen: list[Tensor] = []
    tokens = model.forward_features(x).shape[1]
    add_prompts(model, COUNT, deep)
    with AttentionMode(lambda attention: seen.append(attention())):
        assert model.forward_features(x).shape[1] == tokens
    assert [map_.shape[-2:] for map_ in seen] == [(tokens + COUNT, tokens + COUNT)] * DEPTH


def test_intermediate_features_of_deep_prompts_are_the_blocks() -> None:
    model, x = frozen(), images(2)
    add_prompts(model, COUNT, deep=True)
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda b, a, out: states.append(out)) for block in model.blocks]
    final, between = model.forward_intermediates(x, output_fmt="NLC", stop_early=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=1e-12)
    for state, features in zip(states, between, strict=True):
        assert torch.equal(state[:, 1:], features)
    add_prompts(remove_prompts(model), COUNT, deep=False)
    with pytest.raises(ValueError, match="forward_intermediates: between the blocks, shallow prompts"):
        model.forward_intermediates(x)


def test_prompts_start_as_the_paper_says() -> None:
    tokens = find_prompts(add_prompts(vit(), 400, deep=True)).tokens
    bound = math.sqrt(6 / (3 * 4 * 4 + WIDTH))
    assert bound * 0.99 < tokens.abs().max() <= bound
    assert tokens.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert tokens.dtype == torch.float64


def test_dropout_acts_in_training_only() -> None:
    model, x = add_prompts(frozen(), COUNT, deep=True, dropout=0.5), images(2)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_half_precision_bases_have_prompts_in_float32() -> None:
    model = add_prompts(vit().bfloat16(), COUNT, deep=True)
    assert find_prompts(model).tokens.dtype == torch.float32
    out = model(images(2).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert find_prompts(model).tokens.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["timm-eva", "timm-swin", "timm-beit", "timm-xcit", "dinov3"])
def test_blocks_that_know_a_grid_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot take visual prompts: its blocks know a grid"):
        add_prompts(zoo.build(name), COUNT, deep=True)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="PEFT's PromptTuningConfig"):
        add_prompts(decoder(), COUNT, deep=True)
    with pytest.raises(ValueError, match="count: needs at least 1 prompt; got 0"):
        add_prompts(vit(), 0, deep=True)
    with pytest.raises(ValueError, match=r"dropout: needs a fraction .*; got 1"):
        add_prompts(vit(), 1, deep=True, dropout=1)
    model = add_prompts(vit(), COUNT, deep=False)
    with pytest.raises(ValueError, match="has prompts already"):
        add_prompts(model, COUNT, deep=True)
    with pytest.raises(ValueError, match="needs full attention"):
        model.forward_features(images(1), is_causal=True)

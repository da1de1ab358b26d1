"""AdaptFormer against the equation, in timm's and transformers' blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.models import images, vit
from toast.baselines.adaptformer import add_adapters, find_adapters, remove_adapters
from toast.baselines.freezing import train_only

#: One of each layout of the MLP.
LAYOUTS = (
    "timm-vit", "timm-vit-parallel-things", "timm-swin", "vit", "dinov2", "bert", "llama", "opt", "mpt",
    "gpt-oss", "gpt2",
)  # fmt: skip


def call(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def wake(model: nn.Module) -> None:
    for adapter in find_adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)


def by_equation(adapter: Any, x: Tensor) -> Tensor:
    hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    return adapter.scale * (hidden @ adapter.up.weight.T + adapter.up.bias)


def test_a_loop_over_the_blocks_computes_the_same() -> None:
    plain, x = vit("registers-layer-scale").requires_grad_(False), images(2)
    model = add_adapters(copy.deepcopy(plain), 5, scale=0.7)
    wake(model)
    found = model(x)
    h = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
    for block, adapter in zip(plain.blocks, find_adapters(model), strict=True):
        h = h + block.ls1(block.attn(block.norm1(h)))
        normed = block.norm2(h)
        h = h + block.ls2(block.mlp(normed) + by_equation(adapter, normed))
    expected = plain.forward_head(plain.norm(h))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_mlps_of_two_modules_are_one(name: str) -> None:
    """An MLP that is a linear map in sum with the adapter: both are seen as one change of its last layer."""
    model, x = zoo.build(name).requires_grad_(False), zoo.example(name)
    add_adapters(model, 5)
    wake(model)
    entered: list[Tensor] = []
    left: list[Tensor] = []
    first, last = {"opt": ("fc1", "fc2"), "bert": ("intermediate", "output.dense")}[name]
    adapters = find_adapters(model)
    block = next(m for m in model.modules() if any(a is adapters[1] for a in m._modules.get("adapters", ())))
    block.get_submodule(first).register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    block.get_submodule(last).register_forward_hook(
        lambda m, args, out: left.append(out - nn.functional.linear(args[0], m.weight, m.bias))
    )
    call(model, x)
    torch.testing.assert_close(left[0], by_equation(adapters[1], entered[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_where_it_was_and_learns(name: str) -> None:
    model, x = zoo.build(name).requires_grad_(False), zoo.example(name)
    before = call(model, x)
    add_adapters(model, 5)
    assert torch.equal(call(model, x), before)
    wake(model)
    after = call(model, x)
    assert not torch.allclose(after, before)
    after.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in key), key
    remove_adapters(model)
    assert torch.equal(call(model, x), before)


def test_start_and_counts() -> None:
    model = add_adapters(vit().bfloat16(), 64)
    adapters = find_adapters(model)
    assert len(adapters) == len(model.blocks)
    for adapter in adapters:
        assert adapter.up.weight.count_nonzero() == adapter.down.bias.count_nonzero() == 0
        assert adapter.down.weight.count_nonzero() == adapter.down.weight.numel()
        assert adapter.down.weight.dtype == torch.float32
    assert adapter.options == {"bottleneck": 64, "scale": 0.1, "dropout": 0.0}
    assert model(images(2).bfloat16()).dtype == torch.bfloat16
    assert list(train_only(model, "adapters")) == ["adapters", "head"]


def test_checkpointing_keeps_the_gradients() -> None:
    model, x = add_adapters(vit(), 5), images(2)
    wake(model)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model.train()(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def test_copies_and_dropout() -> None:
    model, x = add_adapters(vit(), 5, dropout=0.5), images(2)
    before, twin = model(x), copy.deepcopy(model)
    wake(twin)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert not torch.equal(twin.train()(x), twin(x))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="bottleneck: needs at least 1 channel; got 0"):
        add_adapters(vit(), 0)
    with pytest.raises(ValueError, match="dropout: needs a fraction"):
        add_adapters(vit(), 5, dropout=-0.1)
    with pytest.raises(ValueError, match="has no adapters"):
        remove_adapters(vit())
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(add_adapters(vit(), 5), 5)
    with pytest.raises(ValueError, match=r"an MLP in every block, at one of mlp, .*ParallelScalingBlock"):
        add_adapters(zoo.build("timm-vit-parallel-scaling"), 5)

"""Rollout, relevance and Grad-CAM are what their papers say, of both passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import zoo
from tests.models import images, vit
from tests.visual.seen import dropped, steer
from toast.tracing import AttentionMode, SeenAttention
from toast.visual.maps import look
from toast.visual.seeing import find_parts

near = torch.testing.assert_close


def patches(whole: Tensor, query: str) -> Tensor:
    row = whole[:, 0, 1:] if query == "class" else whole[:, 1:, 1:].mean(1)
    return (row / row.sum(-1, keepdim=True)).view(-1, 4, 4)


@pytest.mark.parametrize("query", ["class", "mean"])
@pytest.mark.parametrize("block", [0, 2])
@torch.no_grad()
def test_rollout_is_the_product_of_what_blocks_mix(query: str, block: int) -> None:
    x = images(2)
    model = steer(vit(), x)
    seen = dropped(model, x)
    views = look(model, x, method="rollout", query=query, block=block)
    for number, maps in enumerate((views.frozen, views.attention)):
        whole = torch.eye(17).double()
        for below in range(block + 1):
            whole = (0.5 * seen[below][number].mean(1) + 0.5 * torch.eye(17).double()) @ whole
        near(whole.sum(-1), torch.ones(2, 17).double())
        near(maps.values, patches(whole, query))


def by_hand(
    model: Any, x: Tensor, classes: Tensor, numbers: tuple[int, ...], head: int | str
) -> list[Tensor]:
    """Chefer's relevance of the class token from the graph of timm's eager code, by pass."""
    slow = copy.deepcopy(model)
    seen: list[list[Tensor]] = []
    for attention in find_parts(slow).attentions:
        attention.fused_attn = False
        kept: list[Tensor] = []
        seen.append(kept)

        def keep(_: nn.Module, args: Any, kept: list[Tensor] = kept) -> None:
            kept.append(args[0])

        attention.attn_drop.register_forward_pre_hook(keep)
    score = slow(x.clone().requires_grad_()).gather(1, classes[:, None]).sum()
    found = []
    for number in numbers:
        whole = torch.eye(17).double()
        maps = [kept[min(number, len(kept) - 1)] for kept in seen]  # below steer_from there is one
        for kept, gradient in zip(maps, torch.autograd.grad(score, maps), strict=True):
            weighed = (gradient * kept).clamp(min=0)
            whole = whole + (weighed.mean(1) if head == "mean" else weighed[:, head]) @ whole
        found.append(patches(whole.detach(), "class"))
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("head", "steer_from"), [("mean", 0), (1, 0), ("mean", 2)])
def test_relevance_follows_the_gradient_of_both_passes(head: int | str, steer_from: int, fused: bool) -> None:
    x, classes = images(2), torch.tensor([3, 1])
    bare = vit()
    plain = copy.deepcopy(bare)
    model = steer(bare, x, steer_from=steer_from)
    for attention in find_parts(model).attentions:
        attention.fused_attn = fused
    views = look(model, x, method="relevance", target=classes, head=head)
    (expected,) = by_hand(model, x, classes, (1,), head)
    (frozen,) = by_hand(plain, x, classes, (0,), head)
    near(views.attention.values, expected)
    near(views.frozen.values, frozen)


def test_the_explained_class_is_the_one_that_the_steered_model_says() -> None:
    x = images(2)
    model = steer(vit(), x)
    said = model(x).argmax(-1)
    views, named = look(model, x, method="relevance"), look(model, x, method="relevance", target=said)
    near(views.attention.values, named.attention.values)
    near(views.frozen.values, named.frozen.values)
    other = look(model, x, method="relevance", target=lambda output: output[:, 0])
    near(other.attention.values, look(model, x, method="relevance", target=0).attention.values)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_gradient_of_a_kernel_that_hides_its_map(grouped: bool) -> None:
    query = torch.randn(2, 4, 5, 6).double().requires_grad_()
    key, value = (torch.randn(2, 2 if grouped else 4, 7, 6).double() for _ in range(2))
    seen: list[SeenAttention] = []
    with AttentionMode(seen.append):
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    weights = torch.randn_like(out)
    (of_output,) = torch.autograd.grad((out * weights).sum(), seen[0].output)
    maps = seen[0]().detach().requires_grad_()
    values = value.repeat_interleave(2, 1) if grouped else value
    (expected,) = torch.autograd.grad((maps @ values * weights).sum(), maps)
    near(seen[0].gradient(of_output), expected)


@pytest.mark.parametrize("block", [1, 3])
def test_grad_cam_of_a_plain_convnext_is_that_of_captum(block: int) -> None:
    attr = pytest.importorskip("captum.attr")
    model, x = zoo.build("timm-convnext").requires_grad_(True), zoo.example("timm-convnext")["x"]
    found = look(model, x, method="grad-cam", block=block, target=2).attention.values
    cam = attr.LayerGradCam(model, model.stages[block]).attribute(x, target=2)[:, 0].clamp(min=0).detach()
    total = cam.sum((1, 2), keepdim=True)
    near(found, torch.where(total > 0, cam / total.clamp(min=1e-300), 0))


def test_grad_cam_of_a_vit_reads_what_enters_the_block() -> None:
    x = images(2)
    model = steer(vit(), x)
    views = look(model, x, method="grad-cam", target=1)
    seen: list[Tensor] = []
    find_parts(model).blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    score = model(x.requires_grad_())[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, seen[1])
    weights = gradient[:, 1:].mean(1)
    cam = torch.stack([seen[1][i, 1:] @ weights[i] for i in range(2)]).clamp(min=0).view(2, 4, 4).detach()
    near(views.attention.values, cam / cam.sum((1, 2), keepdim=True))


def test_energy_is_the_square_of_what_leaves_the_block() -> None:
    x = images(2)
    model = steer(vit(), x)
    seen: list[Tensor] = []
    find_parts(model).blocks[1].register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    views = look(model, x, method="energy", block=1)
    for maps, out in zip((views.frozen, views.attention), seen, strict=True):
        squares = out[:, 1:].square().sum(-1).view(2, 4, 4)
        near(maps.values, squares / squares.sum((1, 2), keepdim=True))

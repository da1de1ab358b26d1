"""`look` shows what the model computed: in both passes, under every kernel, and it leaves nothing behind."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests import zoo
from tests.models import DEPTH, images, vit
from tests.snapshots import refused, structure
from tests.steered import set_checkpointing
from tests.visual.seen import dropped, shares, steer
from toast.visual.maps import look
from toast.visual.seeing import find_parts

near = torch.testing.assert_close
PREFIX = {"class-token": 1, "average": 0, "registers-layer-scale": 3, "attention-pool": 0}


def lora(**options: Any) -> Any:
    model = get_peft_model(vit(), LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False, **options))
    return model.double().eval()


# The maps are those of the models' own eager code.


@pytest.mark.parametrize(("kind", "fused"), [*((kind, True) for kind in PREFIX), ("class-token", False)])
@torch.no_grad()
def test_both_passes_of_a_vit_are_those_of_its_eager_attention(kind: str, fused: bool) -> None:
    x = images(2)
    model = steer(vit(kind), x)
    for attention in find_parts(model).attentions:
        attention.fused_attn = fused
    expected, output = dropped(model, x), model(x)
    for block in (0, DEPTH - 1):
        for query in ("class", "mean") if kind != "average" and PREFIX[kind] else ("mean",):
            for head in (2, "mean"):
                views = look(model, x, block=block, head=head, query=query)
                found = [(views.frozen, views.frozen_on_patches), (views.attention, views.on_patches)]
                for (maps, on_patches), eager in zip(found, expected[block], strict=True):
                    wanted, total = shares(eager, PREFIX[kind], 4, query, head)
                    near(maps.values, wanted)
                    near(on_patches, total)
                    near(maps.values.sum((1, 2)), torch.ones(2).double())
                assert torch.equal(views.output, output)
    assert not torch.equal(views.frozen.values, views.attention.values)
    near(views.difference.values.sum((1, 2)), torch.zeros(2).double())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit", 1), ("deit", 2), ("dinov2", 1), ("dinov3", 3), ("clip-vision", 1), ("siglip-vision", 0),
     ("beit", 1)],
)  # fmt: skip
@torch.no_grad()
def test_both_passes_are_what_transformers_returns(name: str, prefix: int, implementation: str) -> None:
    bare, x = zoo.build(name), zoo.example(name)["pixel_values"]
    bare.set_attn_implementation(implementation)
    model = steer(bare, x)
    eager = copy.deepcopy(model)
    eager.base_model.model.set_attn_implementation("eager")
    with eager.disable_adapter():
        first = eager(x, output_attentions=True).attentions
    second = eager(x, output_attentions=True).attentions
    query = "class" if prefix else "mean"
    for block in (0, 2):
        views = look(model, x, block=block)
        assert views.query == query
        for maps, attentions in ((views.frozen, first), (views.attention, second)):
            wanted, _ = shares(attentions[block].double(), prefix, 4, query, "mean")
            near(maps.values.double(), wanted, rtol=0, atol=2e-6)  # transformers' softmax is in float32


@torch.no_grad()
def test_a_plain_model_shows_its_own_attention() -> None:
    bare, x = vit(), images(2)
    expected = dropped(bare, x)
    views = look(bare, x, block=1)
    near(views.attention.values, shares(expected[1][0], 1, 4, "class", "mean")[0])
    assert views.frozen is views.difference is views.selection is views.frozen_on_patches is None
    assert views.signals == {}


@torch.no_grad()
def test_an_adapter_of_another_method_is_shown_beside_its_base() -> None:
    model, x = lora(), images(2)
    with_lora = dropped(model, x)
    with model.disable_adapter():
        without = dropped(model, x)
    model.requires_grad_(False)
    views = look(model, x)
    near(views.attention.values, shares(with_lora[2][0], 1, 4, "class", "mean")[0])
    near(views.frozen.values, shares(without[2][0], 1, 4, "class", "mean")[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.disable_adapter():
        assert look(model, x).frozen is None


@torch.no_grad()
def test_above_the_block_that_is_read_the_frozen_model_goes_on() -> None:
    bare, x = vit(), images(2)
    expected = look(bare, x).attention.values
    views = look(steer(bare, x, select_from=0), x)
    near(views.frozen.values, expected)
    assert not torch.equal(views.attention.values, expected)


@torch.no_grad()
def test_below_the_steered_blocks_both_passes_are_one() -> None:
    x = images(2)
    model = steer(vit(), x, steer_from=2)
    expected = dropped(model, x)
    views = look(model, x, block=1)
    assert len(expected[1]) == 1
    near(views.attention.values, shares(expected[1][0], 1, 4, "class", "mean")[0])
    assert torch.equal(views.attention.values, views.frozen.values)
    assert list(views.signals) == [2]


@torch.no_grad()
def test_the_selection_and_the_signals_are_those_of_the_patches() -> None:
    import toast

    x = images(2)
    model = steer(vit("registers-layer-scale"), x)
    traced, views = toast.trace(model, x), look(model, x)
    near(views.selection.values.flatten(1), traced.selection_weights[:, 3:])
    for block, norms in views.signals.items():
        near(norms.values.flatten(1), traced.signals[block][:, 3:].square().sum(-1).sqrt())
    assert views.selection.cell == (4, 4)


# Under other conditions.


@pytest.mark.parametrize("name", ["timm-vit", "vit"])
@torch.no_grad()
def test_maps_in_bfloat16_are_those_of_its_eager_attention(name: str) -> None:
    bare, x = zoo.build(name), next(iter(zoo.example(name).values()))
    model = steer(bare, x)
    fine = look(model, x)
    coarse = look(model.bfloat16(), x)
    assert coarse.attention.values.dtype == torch.float32
    for maps in (coarse.attention, coarse.frozen):
        near(maps.values.sum((1, 2)), torch.ones(2))
    near(coarse.attention.values.double(), fine.attention.values, rtol=0, atol=2e-2)
    if name == "timm-vit":
        for maps, eager in zip(
            (coarse.frozen, coarse.attention), dropped(model, x.bfloat16())[2], strict=True
        ):
            near(maps.values, shares(eager.float(), 1, 4, "class", "mean")[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["attention", "relevance"])
@pytest.mark.parametrize("name", ["timm-vit", "vit"])
def test_activation_checkpointing_changes_no_map(name: str, method: str) -> None:
    bare, x = zoo.build(name), next(iter(zoo.example(name).values()))
    model = steer(bare, x)
    expected = look(model, x, method=method)
    set_checkpointing(bare)
    found = look(model.train(), x, method=method)
    assert model.training
    near(found.attention.values, expected.attention.values)
    near(found.frozen.values, expected.frozen.values)


@pytest.mark.parametrize("kind", ["plain", "steered", "select_from"])
def test_two_threads_do_not_see_each_other(kind: str) -> None:
    x, other = images(2), images(2)
    options = {"select_from": 0} if kind == "select_from" else {}
    model = vit() if kind == "plain" else steer(vit(), x, **options)
    with torch.no_grad():
        expected, output = look(model, x, method="rollout"), model(other)
    stop, wrong, calls = threading.Event(), [], [0]

    @torch.no_grad()
    def use() -> None:
        while not stop.is_set():
            calls[0] += 1
            if not torch.equal(model(other), output):
                wrong.append("a call changed")

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for turn in range(500):  # a busy machine may not let the other thread run for a while
            if turn >= 4 and calls[0] > 1:
                break
            views = look(model, x, method="rollout")
            assert torch.equal(views.attention.values, expected.attention.values)
            assert kind == "plain" or torch.equal(views.frozen.values, expected.frozen.values)
    finally:
        stop.set()
        thread.join()
    assert calls[0] > 1
    assert not wrong


@pytest.mark.parametrize("kind", ["plain", "steered", "select_from", "lora"])
def test_nothing_stays_at_the_model(kind: str) -> None:
    x = images(2)
    model: Any = {
        "plain": vit,
        "lora": lora,
        "steered": lambda: steer(vit(), x),
        "select_from": lambda: steer(vit(), x, select_from=0),
    }[kind]()
    model(x)
    before = structure(model)
    for method in ("attention", "rollout", "relevance", "grad-cam", "energy"):
        look(model, x, method=method)
    with refused(model, "given to break"):
        look(model, x, method="relevance", target=broken)
    assert structure(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def broken(output: Any) -> Tensor:
    raise ValueError("given to break")


def test_looking_works_within_inference_mode() -> None:
    x = images(2)
    model = steer(vit(), x)
    expected = look(model, x, method="relevance").attention.values
    with torch.inference_mode():
        assert torch.equal(look(model, x, method="relevance").attention.values, expected)


# Families.


@pytest.mark.parametrize("name", [n for n in zoo.TIMM if n not in ("timm-maxvit", "timm-vit-diff-parallel")])
@torch.no_grad()
def test_every_family_of_timm_can_be_looked_at(name: str) -> None:
    bare, x = zoo.build(name), zoo.example(name)["x"]
    plain = look(bare, x)
    views = look(steer(bare, x), x)
    near(views.frozen.values, plain.attention.values)
    near(views.attention.values.sum((1, 2)), torch.ones(2).double())
    assert not torch.equal(views.attention.values, views.frozen.values)
    assert views.method == ("energy" if "convnext" in name or "xcit" in name else "attention")
    size = x.shape[-1]
    for maps in (views.attention, views.selection, *views.signals.values()):
        assert maps.cell[0] * maps.values.shape[1] == maps.cell[1] * maps.values.shape[2] == size


# What cannot be shown.


def test_what_is_not_there_is_refused() -> None:
    model, x = vit(), images(2)
    for wrong, message in [
        ({"block": 3}, "has blocks 0 to 2; got 3"),
        ({"block": -4}, "has blocks 0 to 2; got -4"),
        ({"head": 3}, "has heads 0 to 2, or 'mean'; got 3"),
        ({"head": 0, "method": "rollout"}, "attention rollout has no single heads"),
        ({"query": "register"}, "needs 'class' or 'mean'; got 'register'"),
        ({"method": "saliency"}, "needs one of attention, rollout, .*; got 'saliency'"),
        ({"method": "relevance", "target": 5}, r"has classes 0 to 4; got \[5, 5\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            look(model, x, **wrong)
    with pytest.raises(ValueError, match="have no class token; use query='mean'"):
        look(vit("average"), x, query="class")
    registers = vit("average", reg_tokens=2)
    with pytest.raises(ValueError, match="have no class token"):
        look(registers, x, query="class")
    assert look(registers, x).attention.values.shape == (2, 4, 4)


def test_what_a_family_lacks_is_refused() -> None:
    from tests.models import decoder

    convnext, x = zoo.build("timm-convnext"), zoo.example("timm-convnext")["x"]
    with pytest.raises(ValueError, match="ConvNeXt does not have; use 'energy' or 'grad-cam'"):
        look(convnext, x, method="attention")
    with pytest.raises(ValueError, match="windows and merging of SwinTransformer interrupt"):
        look(zoo.build("timm-swin"), zoo.example("timm-swin")["x"], method="rollout")
    name = "timm-vit-diff-parallel"
    with pytest.raises(ValueError, match="more than one attention"):
        look(zoo.build(name), zoo.example(name)["x"])
    with pytest.raises(ValueError, match="one of language"):
        look(decoder(), images(2))
    with pytest.raises(ValueError, match="gives no scores of classes"):
        look(zoo.build("clip-vision"), zoo.example("clip-vision")["pixel_values"], method="relevance")

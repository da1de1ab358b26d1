"""Steering from a block upward: what is below runs once, and the outcome is the same."""

from __future__ import annotations

import copy
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import toast
from tests.models import CACHE, DEPTH, awaken, decoder, images, tokens, vit
from tests.steered import assert_same, blocks_of, call, checkpoint, gradients, inputs, steer, steered, trained
from tests.zoo import build
from toast.injection.shares import place_shares
from toast.steering import find_steering

KINDS = ["vit", "llama", "gpt2", "mistral"]
FROM = [(1, None), (2, None), (2, 0), (1, 0), (2, 1)]


def bare(kind: str) -> Any:
    torch.manual_seed(3)
    return vit() if kind == "vit" else decoder(kind)


def twin(model: Any, kind: str, steer_from: int) -> Any:
    """The same steering of all blocks, with no signal below."""
    select_from = model.peft_config["default"].select_from
    whole = steer(bare(kind), kind, select_from=select_from)
    own = model.state_dict()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name in own:
                parameter.copy_(own[name])
            elif "to_signal" in name:
                parameter.zero_()
    return whole


def runs(model: Any, run: Any) -> list[int]:
    """How often each block ran."""
    count: Counter[int] = Counter()
    handles = [
        block.register_forward_hook(lambda *_, i=i: count.update([i]))
        for i, block in enumerate(blocks_of(model))
    ]
    run()
    for handle in handles:
        handle.remove()
    return [count[i] for i in range(DEPTH)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steer_from", "select_from"), FROM)
def test_outcome_and_gradients_are_those_of_no_signal_below(
    kind: str, steer_from: int, select_from: int | None
) -> None:
    model = steer(bare(kind), kind, steer_from=steer_from, select_from=select_from)
    whole, (x,) = twin(model, kind, steer_from), inputs(kind)
    assert_same(call(model, x), call(whole, x))
    shared = set(trained(model))
    expected = dict(zip(trained(whole), gradients(whole, x), strict=True))
    assert_same(gradients(model, x), [expected[name] for name in trained(model)])
    assert len(shared) == 2 + 2 * (DEPTH - steer_from)
    checkpoint(model)
    assert_same(gradients(model, x), [expected[name] for name in trained(model)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steer_from", "select_from"), FROM)
def test_blocks_below_run_once(kind: str, steer_from: int, select_from: int | None) -> None:
    model, (x,) = steer(bare(kind), kind, steer_from=steer_from, select_from=select_from), inputs(kind)
    read = DEPTH - 1 if select_from is None else select_from
    expected = [(i <= read) + (i >= min(steer_from, read + 1)) for i in range(DEPTH)]
    assert runs(model, lambda: call(model, x)) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(("steer_from", "select_from"), FROM)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(kind: str, steer_from: int, select_from: int | None, cache: str) -> None:
    model = steer(bare(kind), kind, steer_from=steer_from, select_from=select_from)
    text = tokens(2)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    for options in ({}, {"num_beams": 3, "attention_mask": mask}):
        given = {"attention_mask": torch.ones_like(text), "max_new_tokens": 6, "do_sample": False} | options
        cached = model.generate(text, **given, cache_implementation=cache)
        assert torch.equal(cached, model.generate(text, **given, use_cache=False))


def test_one_cache_layer_for_what_runs_once() -> None:
    model = steer(bare("llama"), "llama", steer_from=2)
    out = model(tokens(1, 5), use_cache=True)
    past = getattr(out, CACHE)
    assert len(past.layers) == DEPTH + 1
    assert {layer.get_seq_length() for layer in past.layers} == {5}
    step = model(tokens(1, 1), **{CACHE: past})
    assert getattr(step, CACHE) is past
    assert {layer.get_seq_length() for layer in past.layers} == {6}
    as_tuple = model(tokens(1, 1), **{CACHE: past}, return_dict=False)
    assert as_tuple[1] is past


def test_who_asks_for_all_blocks_gets_them() -> None:
    model, whole = steer(bare("llama"), "llama", steer_from=1), None
    x = tokens(2)
    whole = twin(model, "llama", 1)
    options = {"output_hidden_states": True, "use_cache": False}
    assert_same(model(x, **options).hidden_states, whole(x, **options).hidden_states)
    with pytest.raises(
        ValueError, match=r"output_hidden_states with a cache needs all blocks .* use_cache=False"
    ):
        model(x, output_hidden_states=True, use_cache=True)
    picture = steer(bare("vit"), "vit", steer_from=1)
    whole = twin(picture, "vit", 1)
    x = images(2)
    assert_same(*(m.get_base_model().forward_intermediates(x)[1] for m in (picture, whole)))


def test_trace_shows_what_is_steered() -> None:
    model, x = steer(bare("vit"), "vit", steer_from=1), images(2)
    traced = toast.trace(model, x, attention_blocks="all", block_states=True)
    assert set(traced.attention) == set(traced.states) == {1, 2}
    assert len(traced.signals) == 2
    with pytest.raises(ValueError, match=r"has steered blocks 1 to 2; got \[0\]"):
        toast.trace(model, x, attention_blocks=[0])
    loss, _ = toast.pretraining_loss(model, x, task_loss=lambda y: y.square().mean())
    loss.backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_save_load_and_pre_tuned_feedback_of_more_blocks(tmp_path: Path) -> None:
    model, x = steer(bare("vit"), "vit", steer_from=1), images(2)
    toast.save_adapter(model, tmp_path / "upper")
    assert torch.equal(PeftModel.from_pretrained(bare("vit"), tmp_path / "upper")(x), model(x))
    whole = steer(bare("vit"), "vit")
    toast.save_adapter(whole, tmp_path / "whole")
    upper = toast.wrap(bare("vit"), pretrained=str(tmp_path / "whole"), steer_from=2, lora_rank=2)
    found, expected = find_steering(upper).values[0], find_steering(whole).values[2]
    assert torch.equal(
        found.toast_to_state["default"].base_layer.weight, expected.toast_to_state["default"].weight
    )
    with pytest.raises(ValueError, match="has no feedback below block 1, this configuration steers from 0"):
        toast.wrap(bare("vit"), pretrained=str(tmp_path / "upper"), steer_from=0)


def test_adapters_of_different_depth_on_one_model() -> None:
    model, x = steer(bare("llama"), "llama", steer_from=2), tokens(2)
    before = call(model, x)
    model.add_adapter("whole", toast.ToastConfig())
    assert torch.equal(call(model, x), before)
    model.set_adapter("whole")
    assert len(find_steering(model).values) == DEPTH
    with model.disable_adapter():
        frozen = call(model, x)
    assert torch.equal(call(model, x), frozen)  # a new one
    model.set_adapter("default")
    assert len(find_steering(model).values) == 1
    assert torch.equal(call(model, x), before)


def test_a_lower_embedding_that_is_trained_gets_its_gradient() -> None:
    found = []
    model = steer(bare("gpt2"), "gpt2", steer_from=1)
    for each in (model, twin(model, "gpt2", 1)):
        weight = each.get_base_model().transformer.wte.weight.requires_grad_()
        loss = call(each, torch.arange(1, 8)[None]).square().mean()
        found.append(torch.autograd.grad(loss, weight))
    assert_same(*found)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="steer_from: needs a block from 0 to 2; got 3"):
        toast.wrap(bare("vit"), steer_from=3)
    for wrong in (-1, -0.1, 1.0, 1.5, float("nan"), "half", True):
        with pytest.raises(ValueError, match="steer_from: needs a block counted from 0, or a share of the"):
            toast.wrap(bare("vit"), steer_from=wrong)
    for place in (1, 0.5):
        with pytest.raises(ValueError, match=f"differ in tokens or width, so all are steered; got {place}"):
            toast.wrap(build("timm-swin"), steer_from=place)
    for wrong in (-1, 1.5, "half"):
        config = toast.ToastConfig()
        config.steer_from = wrong
        with pytest.raises(ValueError, match=f"steer_from: needs a block from 0 to 2; got {wrong!r}"):
            get_peft_model(bare("vit"), config)
    config.steer_from = np.int64(1)
    assert type(get_peft_model(bare("vit"), config).peft_config["default"].steer_from) is int


@pytest.mark.parametrize(
    ("share", "depth", "block"),
    [(0.0, 3, 0), (0.5, 3, 1), (0.75, 12, 9), (0.7, 10, 7), (0.29, 100, 29), (0.99, 2, 1), (1 - 1e-12, 4, 3)],
)
def test_a_share_of_the_depth_is_a_block(share: float, depth: int, block: int) -> None:
    config = toast.ToastConfig(steer_from=share, select_from=share)
    place_shares(config, depth)
    assert (config.steer_from, config.select_from) == (block, block)
    assert isinstance(config.steer_from, int)


def test_a_share_is_taken_of_each_model_and_saved_as_its_block(tmp_path: Path) -> None:
    """One configuration serves models of several depths, and an adapter on a pre-tuned one."""
    config = toast.ToastConfig(steer_from=0.5, select_from=0.7)
    for depth, steers, reads in ((4, 2, 2), (10, 5, 7)):
        model = get_peft_model(vit(depth=depth), config)
        used = model.peft_config["default"]
        assert (used.steer_from, used.select_from) == (steers, reads)
        model.save_pretrained(str(tmp_path / str(depth)))
        again = PeftModel.from_pretrained(model.unload(), str(tmp_path / str(depth)))
        used = again.peft_config["default"]
        assert (used.steer_from, used.select_from) == (steers, reads)
    pretuned = str(tmp_path / "4")
    with pytest.raises(ValueError, match="no feedback below block 2, this configuration steers from 1"):
        toast.wrap(vit(depth=4), pretrained=pretuned, steer_from=0.25)


def test_shares_that_were_written_without_a_model(tmp_path: Path) -> None:
    """A configuration may be saved before it meets a model, beside weights that were trained with it."""
    base, pixels, shares = vit(depth=4), images(), {"steer_from": 0.5, "select_from": 0.75}
    model = awaken(toast.wrap(copy.deepcopy(base), **shares)).eval()
    model.save_pretrained(str(tmp_path))
    toast.ToastConfig(**shares).save_pretrained(str(tmp_path))
    again = toast.wrap(copy.deepcopy(base), pretrained=str(tmp_path), steer_from=2).eval()
    assert again.peft_config["default"].select_from == 3
    assert_same(again(pixels), model(pixels))


@pytest.mark.parametrize(
    ("given", "kept"), [(np.float32(0.5), 0.5), (np.int64(2), 2), (Fraction(1, 4), 0.25)]
)
def test_numbers_of_other_types_can_be_saved(given: Any, kept: float, tmp_path: Path) -> None:
    toast.ToastConfig(steer_from=given, select_from=given).save_pretrained(str(tmp_path))
    saved = toast.ToastConfig.from_pretrained(str(tmp_path))
    assert (saved.steer_from, saved.select_from) == (kept, kept)


def test_quiet_modules() -> None:
    """Nothing below the steered blocks is wrapped."""
    model = steered("vit", steer_from=2)
    wrapped = [
        n for n, m in model.named_modules() if isinstance(m, nn.Module) and hasattr(m, "toast_to_state")
    ]
    assert [name.rpartition("blocks.")[2] for name in wrapped] == ["2.attn.qkv"]

"""Activation checkpointing recomputes blocks in the pass of their call, whenever and wherever that is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import toast
from tests.models import decoder, vit
from tests.steered import (
    MODELS,
    assert_same,
    blocks_of,
    call,
    checkpoint,
    gradients,
    inputs,
    set_checkpointing,
    steer,
    steered,
    trained,
)


def counted(model: Any) -> list[int]:
    """Counts the runs of the middle block's MLP: one more than passes says that it was recomputed."""
    runs: list[int] = []
    blocks_of(model)[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize(
    "lite",
    [{"feedback_form": "per_token"}, {"feedback_form": "composed"}, {"lora_rank": 2}],
    ids=["full", "composed", "lite"],
)
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_changes_no_gradient(kind: str, enabled: str, lite: dict[str, int]) -> None:
    bare = vit() if kind == "vit" else decoder(kind)
    if enabled == "before":
        set_checkpointing(bare)
    model, (x, later) = steer(bare, kind, **lite), inputs(kind, 2)
    plain = steer(copy.deepcopy(model).unload(), kind, **lite)
    plain.load_state_dict(model.state_dict())
    set_checkpointing(plain.base_model.model, False)
    plain.train()
    expected = gradients(plain, x)
    if enabled == "after":
        checkpoint(model)
    model.train()
    runs = counted(model)
    out = call(model, x)
    with torch.no_grad():
        call(model, later)  # must not be what the recomputation sees
    assert_same(out, call(plain, x))
    before = len(runs)
    found = torch.autograd.grad(out.square().mean(), list(trained(model).values()))
    assert len(runs) == before + 1
    assert_same(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_recomputation_repeats_the_dropout_of_its_call() -> None:
    model, (x,) = steered("gpt2"), inputs("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    found = []
    for enable in (False, True):
        set_checkpointing(model.train().base_model.model, enable)
        torch.manual_seed(5)
        found.append(gradients(model, x))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("kind", MODELS)
def test_backward_of_a_checkpointed_call_may_run_in_another_thread(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    expected = gradients(model, x)
    checkpoint(model)
    loss = call(model, x).square().mean()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, loss, list(trained(model).values())).result()
    assert_same(found, expected)


def test_intermediate_features_are_checkpointed_too() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        last, between = model.base_model.model.forward_intermediates(x, norm=True)
        return last.mean() + sum(b.square() for b in between)

    model, (x,) = steered("vit"), inputs("vit")
    expected = gradients(model, x, run)
    checkpoint(model)
    runs = counted(model)
    assert_same(gradients(model, x, run), expected)
    assert len(runs) == 3


@pytest.mark.parametrize("kind", MODELS)
def test_pre_training_with_maps_and_states_under_checkpointing(kind: str) -> None:
    name = "x" if kind == "vit" else "input_ids"

    def run(model: Any, x: Tensor) -> Tensor:
        traced = toast.trace(model, **{name: x}, attention_blocks="all", block_states=True)
        output = traced.output if kind == "vit" else traced.output.logits
        maps = sum(a.square().sum() for a in traced.attention.values())
        return output.square().mean() + maps + toast.reconstruction_loss(model, traced)

    model, (x,) = steered(kind), inputs(kind)
    expected = gradients(model, x, run)
    checkpoint(model)
    assert_same(gradients(model, x, run), expected)


def test_recomputation_does_not_touch_a_trace() -> None:
    model, (x,) = steered("vit"), inputs("vit")
    checkpoint(model)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        traced = toast.trace(model, x, attention_blocks="all", block_states=True)
    states = dict(traced.states)
    traced.output.sum().backward()
    assert all(traced.states[block] is kept for block, kept in states.items())


@contextlib.contextmanager
def timm_reentrant() -> Iterator[None]:
    timm.layers.set_reentrant_ckpt(True)
    try:
        yield
    finally:
        timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize("kind", MODELS)
def test_reentrant_checkpointing_is_refused_before_a_block_runs(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    checkpoint(model, use_reentrant=True)
    runs = counted(model)
    with timm_reentrant(), pytest.raises(ValueError, match=r"re-entrant .* loses the gradient"):
        call(model, x)
    assert not runs
    if kind != "vit":  # only where it would act
        model.eval()
        call(model, x)
        model.train()
        set_checkpointing(model.base_model.model, False)
        call(model, x)


def test_unloading_gives_blocks_their_checkpointing_back() -> None:
    model, (x,) = steered("llama"), inputs("llama")
    checkpoint(model)
    own = blocks_of(model)[0]._gradient_checkpointing_func
    call(model, x)
    blocks = blocks_of(model)
    assert blocks[0]._gradient_checkpointing_func is not own
    model.unload()
    assert blocks[0]._gradient_checkpointing_func is own


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # the first pass
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_loses_the_pass_is_an_error_and_no_wrong_gradient(reentrant: bool) -> None:
    model = steered("llama")
    layers = model.get_base_model().model.layers
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)
    model.train().enable_input_require_grads()
    (x,) = inputs("llama")
    with pytest.raises(RuntimeError, match="outside of a call of its trunk"):
        call(model, x).square().mean().backward()

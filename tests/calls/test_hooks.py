"""Hooks of the user's on a steered model: they fire, see what they should, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toast
from tests.models import images, tokens
from tests.steered import assert_same, blocks_of, call, gradients, steered
from toast.steering import find_steering


@pytest.mark.parametrize("kind", ["vit", "gpt2"])  # both with queries, keys and values in one projection
@pytest.mark.parametrize("form", ["per_token", "composed"])
def test_backward_hooks_on_a_fused_projection(kind: str, form: str) -> None:
    model = steered(kind, feedback_form=form)
    x = images(2) if kind == "vit" else tokens(2)
    expected = gradients(model, x)
    seen: list[Tensor] = []
    for value in find_steering(model).values:
        value.base_layer.register_full_backward_hook(lambda m, into, out: seen.append(out[0]))
        value.base_layer.register_full_backward_pre_hook(lambda m, out: None)
    assert_same(gradients(model, x), expected)
    assert len(seen) >= 2


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
def test_what_a_hook_keeps_is_not_changed_afterwards(everywhere: bool) -> None:
    model, x = steered("vit"), images(2)
    projections = [value.base_layer for value in find_steering(model).values]
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if module in projections:
            kept.append((out, out.detach().clone()))

    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(keep)]
    else:
        handles = [each.register_forward_hook(keep) for each in projections]
    expected = call(model, x)
    for handle in handles:
        handle.remove()
    assert len(kept) == 2 * len(projections)
    assert all(torch.equal(out, as_it_was) for out, as_it_was in kept)
    assert torch.equal(call(model, x), expected)


def test_a_hook_can_ask_which_pass_runs() -> None:
    model, x = steered("vit", steer_from=1), images(2)
    seen: dict[int, list[int]] = {0: [], 2: []}
    for index, passes in seen.items():
        blocks_of(model)[index].register_forward_hook(
            lambda *_, passes=passes: passes.append(toast.running_pass())
        )
    model(x)
    assert seen == {0: [1], 2: [1, 2]}  # below steer_from a block runs once
    with model.disable_adapter():
        model(x)
    assert seen == {0: [1, 0], 2: [1, 2, 0]}
    assert toast.running_pass() == 0


@pytest.mark.parametrize("options", [{"steer_from": 1}, {"select_from": 0}], ids=str)
def test_what_a_hook_makes_of_a_block_is_what_counts(options: dict[str, Any]) -> None:
    """A change after block 0 and one before block 1 are the same, in both passes and with checkpointing."""
    model, x = steered("vit", **options), images(2)
    trunk = model.get_base_model()
    handle = blocks_of(model)[0].register_forward_hook(lambda module, args, out: out * 1.5)
    after = call(model, x)
    model.train()
    trunk.set_grad_checkpointing(True)
    checkpointed = call(model, x)
    trunk.set_grad_checkpointing(False)
    handle.remove()
    if "steer_from" in options:
        blocks_of(model)[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        assert_same(after, call(model, x))
    assert_same(checkpointed, after)


def test_hooks_for_activation_checkpointing_are_put_back() -> None:
    model = steered("gpt2").train()
    bare = model.get_base_model()
    bare.enable_input_require_grads()
    before = dict(bare.get_input_embeddings()._forward_hooks)
    call(model, tokens(2))
    assert bare.get_input_embeddings()._forward_hooks != before
    model.unload()
    assert bare.get_input_embeddings()._forward_hooks == before

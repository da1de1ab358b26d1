"""A stored first pass gives what the whole call gives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import toast
from tests.families.test_table import call as call_row
from tests.families.test_table import inputs as inputs_of_row
from tests.families.test_table import steered as steered_row
from tests.models import decoder, images, tokens, vit
from tests.steered import assert_same, blocks_of, call, inputs, steer, steered, trained


@pytest.mark.parametrize(
    "name",
    ["timm-vit", "timm-swin", "timm-convnext", "timm-cait", "llama", "gptj", "bloom", "bert", "clip-vision"],
)
@pytest.mark.parametrize("options", [{}, {"steer_from": 1}, {"select_features": "mixed"}])
def test_outcome_and_gradients_are_the_same(name: str, options: dict[str, Any]) -> None:
    if "steer_from" in options and name in ("timm-swin", "timm-convnext"):
        return
    model, x = steered_row(name, **options), inputs_of_row(name)
    whole = call_row(model, x)
    expected = torch.autograd.grad(whole.square().mean(), list(trained(model).values()))
    stored = toast.first_pass(model, **x)
    assert set(stored.tensors()) == (
        {"normed"} | ({"entering"} if "steer_from" in options else set())
        | ({"unnormed"} if "select_features" in options else set())
    )  # fmt: skip
    with toast.given_first_pass(model, stored):
        found = call_row(model, x)
    assert torch.equal(found, whole)
    assert_same(torch.autograd.grad(found.square().mean(), list(trained(model).values())), expected)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_only_what_is_left_runs(kind: str) -> None:
    model = steer(vit() if kind == "vit" else decoder(), kind, steer_from=2)
    (x,), ran = inputs(kind), []
    stored = toast.first_pass(model, x)
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_hook(lambda *_, i=index: ran.append(i))
    with toast.given_first_pass(model, stored):
        call(model, x)
    assert ran == [2]
    ran.clear()
    toast.first_pass(model, x)
    assert ran == [0, 1, 2]


def test_the_first_pass_alone_gives_the_frozen_output_nothing_else() -> None:
    model, x = steered("vit"), images(2)
    stored = toast.first_pass(model, x)
    assert_same(stored.normed, toast.trace(model, x).features)
    moved = stored.to(torch.float32)
    assert {tensor.dtype for tensor in moved.tensors().values()} == {torch.float32}


def test_the_optimiser_step_is_the_same() -> None:
    found = []
    for use in (False, True):
        torch.manual_seed(0)
        model, x = steered("vit"), images(4)
        optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-3)
        stored = toast.first_pass(model, x)
        for _ in range(3):
            if use:
                with toast.given_first_pass(model, stored):
                    loss = model(x).square().mean()
            else:
                loss = model(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append([p.detach().clone() for p in trained(model).values()])
    assert_same(*found)


def test_what_does_not_fit_is_refused() -> None:
    model, x = steer(vit(), "vit", steer_from=1), images(3)
    stored = toast.first_pass(model, x)
    with toast.given_first_pass(model, stored), pytest.raises(ValueError, match="has 3 samples, the call 2"):
        model(x[:2])
    whole = toast.first_pass(steered("vit"), x)
    with toast.given_first_pass(model, whole), pytest.raises(ValueError, match="made with steer_from=0"):
        model(x)
    unknown = dataclasses.replace(whole, origin=None)
    with toast.given_first_pass(model, unknown), pytest.raises(ValueError, match="has no state that enters"):
        model(x)
    language = steered("llama")
    with pytest.raises(ValueError, match="cannot be used or made with a key-value cache"):
        toast.first_pass(language, tokens(2), use_cache=True)
    with pytest.raises(ValueError, match="it ran 2 times"):
        toast.first_pass(Twice(language), tokens(2))
    with pytest.raises(ValueError, match="first_pass needs a model with an active TOAST adapter"):
        toast.first_pass(vit(), x)


class Twice(nn.Module):
    """Calls a model two times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits + self.model(x).logits


# Who a stored first pass holds for.


def vision() -> tuple[Any, torch.Tensor, toast.stored_pass.FirstPass, torch.Tensor, torch.Tensor]:
    """A model, pictures, the first pass of others, what the model makes of the pictures, and what with it."""
    model, x = steered("vit"), images(2)
    stored = toast.first_pass(model, images(2))
    with toast.given_first_pass(model, stored):
        swapped = model(x)
    own = model(x)
    assert (own - swapped).abs().max() > 1e-3
    return model, x, stored, own, swapped


@contextmanager
def given(model: nn.Module, stored: toast.stored_pass.FirstPass) -> Iterator[None]:
    with toast.given_first_pass(model, stored):
        yield


def test_not_for_the_consumer_of_a_generator() -> None:
    model, x, stored, own, swapped = vision()

    def outputs(manager: Any) -> Iterator[torch.Tensor]:
        with manager(model, stored):
            yield model(x)
            yield model(x)

    for manager in (toast.given_first_pass, given):
        for out in outputs(manager):
            assert torch.equal(out, swapped)
            assert torch.equal(model(x), own)
    with given(model, stored):  # a generator that serves as a context manager is none of these
        assert torch.equal(model(x), swapped)
    with ExitStack() as stack:
        stack.enter_context(toast.given_first_pass(model, stored))
        assert torch.equal(model(x), swapped)
    assert torch.equal(model(x), own)


def test_not_beyond_who_a_helper_enters_it_for() -> None:
    model, x, stored, own, swapped = vision()

    def enter(stack: ExitStack) -> None:
        stack.enter_context(toast.given_first_pass(model, stored))

    def outputs() -> Iterator[torch.Tensor]:
        with ExitStack() as stack:
            enter(stack)
            yield model(x)

    for out in outputs():
        assert torch.equal(out, swapped)
        assert torch.equal(model(x), own)
    with ExitStack() as stack:
        enter(stack)
        assert torch.equal(model(x), swapped)
    assert torch.equal(model(x), own)


def test_not_for_other_coroutines() -> None:
    model, x, stored, own, swapped = vision()

    async def with_stored() -> None:
        with toast.given_first_pass(model, stored):
            for _ in range(3):
                assert torch.equal(model(x), swapped)
                await asyncio.sleep(0)
        for _ in range(3):
            assert torch.equal(model(x), own)
            await asyncio.sleep(0)

    async def without() -> None:
        for _ in range(6):
            assert torch.equal(model(x), own)
            await asyncio.sleep(0)

    async def run() -> None:
        await asyncio.gather(with_stored(), without(), with_stored(), without())

    asyncio.run(run())
    assert torch.equal(model(x), own)


def test_of_two_models_each_its_own() -> None:
    (model, x, stored, _, swapped), (other, y, of_other, _, other_swapped) = vision(), vision()
    with toast.given_first_pass(model, stored), toast.given_first_pass(other, of_other):
        assert torch.equal(model(x), swapped)
        assert torch.equal(other(y), other_swapped)


def test_other_settings_and_inputs_are_refused() -> None:
    x = images(2)
    read_below = toast.first_pass(steered("vit", select_from=1), x)
    model = steered("vit")
    with (
        toast.given_first_pass(model, read_below),
        pytest.raises(ValueError, match="made with select_from=1"),
    ):
        model(x)
    unnormed = toast.first_pass(steered("vit", select_features="unnormed"), x)
    for stored in (unnormed, dataclasses.replace(unnormed, origin=None)):
        with toast.given_first_pass(model, stored), pytest.raises(ValueError, match="select_features"):
            model(x)
    language = steered("llama")
    stored = toast.first_pass(language, input_ids=tokens(2, 6), use_cache=False)
    with (
        toast.given_first_pass(language, stored),
        pytest.raises(ValueError, match=r"of shape \(6,\), the call's"),
    ):
        language(input_ids=tokens(2, 9), use_cache=False)

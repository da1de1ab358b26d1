"""`torch.compile` of wrapped models: whole graphs, the same numbers, no recompilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

import toast
from tests.models import CACHE, decoder, images, tokens, vit
from tests.steered import steer, trained

DEPTH = 2  # the time that compiling takes grows with it


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def tiny(kind: str, **options: Any) -> Any:
    bare = vit(depth=DEPTH) if kind == "vit" else decoder(kind, num_hidden_layers=DEPTH)
    return steer(bare, kind, **options).float()


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x) if x.is_floating_point() else model(input_ids=x, use_cache=False).logits


def same(found: Any, expected: Any) -> None:
    for this, other in zip(found, expected, strict=True):
        torch.testing.assert_close(this, other, rtol=0, atol=2e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(
    ("kind", "form", "options"),
    [
        ("vit", "per_token", {"steer_from": 1}),
        ("vit", "composed", {"lora_rank": 2}),
        ("llama", "composed", {}),
        ("llama", "per_token", {"lora_rank": 2}),
    ],
)
def test_one_graph_forward_and_backward(kind: str, form: str, options: dict[str, Any]) -> None:
    model = tiny(kind, feedback_form=form, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [images(2).float() for _ in range(2)] if kind == "vit" else [tokens(2) for _ in range(2)]
    parameters = list(trained(model).values())
    before = logits(model, inputs[0]).detach()
    seen = []
    for x in inputs:
        found, expected = (logits(each, x) for each in (compiled, model))
        same([found.detach()], [expected.detach()])
        same(*(torch.autograd.grad(out.square().mean(), parameters) for out in (found, expected)))
        seen.append(graphs())
    assert seen[0] == seen[-1]  # nothing was compiled again
    assert torch.equal(logits(model, inputs[0]).detach(), before)  # the model itself is what it was


def test_inductor() -> None:
    model = tiny("vit")
    compiled, x = torch.compile(model, fullgraph=True), images(2).float()
    parameters = list(trained(model).values())
    for _ in range(2):
        found, expected = (logits(each, x) for each in (compiled, model))
        same([found.detach()], [expected.detach()])
        same(*(torch.autograd.grad(out.square().mean(), parameters) for out in (found, expected)))
    assert graphs() == 1


def test_fused() -> None:
    model = tiny("vit").requires_grad_(False)
    x = images(2).float()
    plain = model(x)
    compiled = torch.compile(toast.fuse(model), fullgraph=True, backend="aot_eager")
    same([compiled(x)], [plain])


@pytest.mark.parametrize("options", [{}, {"steer_from": 1}], ids=["full", "upper"])
def test_a_decode_step_on_a_static_cache(options: dict[str, Any]) -> None:
    model = tiny("llama", **options).requires_grad_(False)
    text = tokens(1, 8)
    with torch.no_grad():
        whole = model(input_ids=text, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = [model(input_ids=text[:, :4], **{CACHE: cache}).logits]
        seen = []
        for at in range(4, 8):
            place = torch.tensor([[at]])
            found.append(step(input_ids=text[:, at : at + 1], **{CACHE: cache}, position_ids=place).logits)
            seen.append(graphs())
    same([torch.cat(found, dim=1)], [whole])
    assert seen[1] == seen[-1]
    assert len(cache.layers) == 2 * DEPTH - options.get("steer_from", 0)

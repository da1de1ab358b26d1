"""Fused and compiled models on a device, and the decode step as a CUDA graph on static caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import toast
from tests.accelerator.placed import relative_error, to_device, twins
from tests.models import CACHE, tokens
from tests.steered import call, gradients, inputs

LIMIT = 1e-5
PROMPT, LENGTH = 4, 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_compiled(device: torch.device, kind: str) -> None:
    model, exact = twins(kind, device, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    for x in inputs(kind, 2):
        here = to_device(x, device, torch.float32)
        assert relative_error(call(compiled, here), call(exact, x)) < LIMIT
        assert relative_error(gradients(compiled, here), gradients(exact, x)) < 3 * LIMIT


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fused(device: torch.device, kind: str, compiled: bool) -> None:
    model, exact = twins(kind, device, torch.float32)
    fused = toast.fuse(model.requires_grad_(False))
    if compiled:
        fused = torch.compile(fused, fullgraph=True)
    (x,) = inputs(kind)
    with torch.no_grad():
        assert relative_error(call(fused, to_device(x, device, torch.float32)), call(exact, x)) < LIMIT


class Decoding:
    """Decodes on a static cache; what a step reads and writes is always at the same place."""

    def __init__(self, device: torch.device, how: Callable[[Any], Any], **options: Any) -> None:
        self.model, exact = twins("llama", device, torch.float32, **options)
        self.model.requires_grad_(False)
        self.text = tokens(1, LENGTH).to(device)
        with torch.no_grad():
            self.expected = call(exact, self.text.cpu())
        self.cache = StaticCache(config=self.model.get_base_model().config, max_cache_len=LENGTH)
        self.token = self.text[:, :1].clone()
        self.place = torch.zeros_like(self.token)
        self.compiled = how(self.model)

    def start(self) -> list[Tensor]:
        """Forgets everything and takes the prompt."""
        self.cache.reset()
        return [self.model(self.text[:, :PROMPT], **{CACHE: self.cache}, use_cache=True).logits]

    def step(self) -> Tensor:
        """Takes the token that is in its place."""
        options = {CACHE: self.cache, "use_cache": True, "position_ids": self.place}
        return self.compiled(input_ids=self.token, **options).logits

    def error(self, step: Callable[[], Tensor]) -> float:
        """Returns the relative error of the logits of a prompt and steps."""
        found = self.start()
        for at in range(PROMPT, LENGTH):
            self.token.copy_(self.text[:, at : at + 1])
            self.place.fill_(at)
            found.append(step().clone())
        return relative_error(torch.cat(found, dim=1), self.expected)


@pytest.mark.parametrize("options", [{}, {"steer_from": 1}, {"lora_rank": 2}], ids=str)
@torch.no_grad()
def test_a_decode_step_as_a_graph(device: torch.device, options: dict[str, Any]) -> None:
    """Captured on CUDA; elsewhere the step itself runs."""
    decoding = Decoding(device, lambda model: model, **options)
    step = decoding.step
    if device.type == "cuda":
        step = captured(decoding)
    assert decoding.error(step) < LIMIT


def captured(decoding: Decoding) -> Callable[[], Tensor]:
    """Returns a decode step that replays a CUDA graph."""
    decoding.start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose and allocate in the first calls
        for _ in range(LENGTH - PROMPT):
            decoding.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoding.step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@torch.no_grad()
def test_a_decode_step_compiled_for_graphs(device: torch.device) -> None:
    """Inductor makes CUDA graphs of it, where there are any."""
    decoding = Decoding(device, lambda model: torch.compile(model, mode="reduce-overhead", fullgraph=True))
    for _ in range(2):
        assert decoding.error(decoding.step) < LIMIT

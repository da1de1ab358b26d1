"""A device computes what the CPU computes in double precision, up to the digits of its format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache

import toast
from tests.accelerator.placed import relative_error, to_device, twins
from tests.generation.test_steered_prompt import in_steps
from tests.models import tokens
from tests.steered import call, inputs, trained

CASES: list[tuple[str, dict[str, Any]]] = [
    ("vit", {"feedback_form": "per_token"}),
    ("vit", {"feedback_form": "composed", "lora_rank": 2}),
    ("llama", {"feedback_form": "composed"}),
    ("llama", {"feedback_form": "per_token", "steer_from": 1}),
    ("gpt2", {"lora_rank": 2}),
]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}
FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@FORMATS
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_forward(device: torch.device, dtype: torch.dtype, kind: str, options: dict[str, Any]) -> None:
    model, exact = twins(kind, device, dtype, **options)
    (x,) = (to_device(x, device, dtype) for x in inputs(kind))
    with torch.no_grad():
        expected = call(exact, to_device(x, torch.device("cpu"), torch.float64))
        assert relative_error(call(model, x), expected) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_training_step(
    device: torch.device, dtype: torch.dtype, kind: str, options: dict[str, Any]
) -> None:
    """Under autocast if it is in half precision, in float16 with gradient scaling."""
    model, exact = twins(kind, device, torch.float32, **options)
    (x,) = inputs(kind)
    labels = torch.randint(0, 5, (len(x),))

    def loss_of(model: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        logits = call(model, to_device(x, device, dtype))
        return F.cross_entropy(logits if logits.dim() == 2 else logits[:, -1], labels.to(device))

    expected = torch.autograd.grad(
        loss_of(exact, torch.device("cpu"), torch.float64), trained(exact).values()
    )
    optimiser = torch.optim.AdamW(toast.parameter_groups(model, 1e-3), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for step in range(2):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, device, torch.float32)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        if step == 0:
            found = [parameter.grad for parameter in trained(model).values()]
            assert relative_error(found, expected) < 3 * LIMITS[dtype]
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_a_step_that_overflows_is_skipped(device: torch.device) -> None:
    model, _ = twins("vit", device, torch.float32)
    optimiser = torch.optim.AdamW(trained(model).values(), fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before = copy.deepcopy(trained(model))
    with torch.autocast(device.type, torch.float16):
        loss = model(to_device(inputs("vit")[0], device, torch.float32)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(parameter.equal(before[name]) for name, parameter in trained(model).items())


@FORMATS
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(("kind", "options"), CASES[2:])
def test_decoding(
    device: torch.device, dtype: torch.dtype, kind: str, options: dict[str, Any], static: bool
) -> None:
    """A prompt, and tokens behind it one by one."""
    model, exact = twins(kind, device, dtype, **options)
    text = tokens(2, 8)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=12) if static else None
    with torch.no_grad():
        found = in_steps(model, text.to(device), [4, 1, 1, 1, 1], cache)
        assert relative_error(found, call(exact, text)) < LIMITS[dtype]
    if dtype == torch.float32:
        how = {"max_new_tokens": 6, "do_sample": False}
        kept = how | ({"cache_implementation": "static"} if static else {})
        mask = torch.ones_like(text)
        mask[1, :3] = 0  # padding on the left
        generated = model.generate(text.to(device), attention_mask=mask.to(device), **kept)
        assert torch.equal(generated.cpu(), exact.generate(text, attention_mask=mask, **how))

"""The losses of the two stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.models import DEPTH, awaken, decoder, images, tokens, vit
from toast.steering import find_steering


def steered(kind: str = "vit", **options: Any) -> Any:
    return awaken(toast.wrap(vit() if kind == "vit" else decoder(kind), **options)).eval()


def inputs(kind: str) -> dict[str, Tensor]:
    return {"x": images(2)} if kind == "vit" else {"input_ids": tokens(2)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


OFFICIAL = {"reconstruction_form": "official"}


def states_of_the_second_pass(
    model: nn.Module, given: dict[str, Tensor]
) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Returns a trace, and what enters and leaves each block as hooks see it."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def keep(block: nn.Module, args: Any, out: Any) -> None:
        entering.append(args[0])
        leaving.append(out[0] if isinstance(out, tuple) else out)

    for block in find_steering(model).blocks:
        block.register_forward_hook(keep)
    traced = toast.trace(model, **given, block_states=True)
    assert len(entering) == 2 * DEPTH
    return traced, [(entering[DEPTH + block], leaving[DEPTH + block]) for block in range(DEPTH)]


def to_state(model: nn.Module, block: int) -> Tensor:
    return find_steering(model).values[block].toast_to_state["default"].weight


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_the_official_reconstruction_is_the_sum_of_mean_squares(kind: str, scale: float) -> None:
    model = steered(kind, reconstruction_scale=scale, **OFFICIAL)
    traced, states = states_of_the_second_pass(model, inputs(kind))
    found = toast.reconstruction_loss(model, traced)
    expected = torch.zeros((), dtype=torch.float64)
    for block, (entering, leaving) in enumerate(states):
        difference = leaving @ to_state(model, block).T - entering
        expected = expected + scale**2 * difference.square().sum() / difference.numel()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_the_relative_reconstruction_is_the_mean_of_each_tokens_relative_error(kind: str) -> None:
    model = steered(kind)
    traced, states = states_of_the_second_pass(model, inputs(kind))
    terms = []
    for block, (entering, leaving) in enumerate(states):
        error = (leaving @ to_state(model, block).T - entering).norm(dim=-1) ** 2
        terms.append(2 * error / (entering.norm(dim=-1) ** 2 + leaving.norm(dim=-1) ** 2))
    torch.testing.assert_close(
        toast.reconstruction_loss(model, traced), torch.stack(terms).mean(), rtol=1e-12, atol=0
    )


def test_the_relative_reconstruction_sees_neither_size_nor_depth_nor_batch() -> None:
    """States a thousand times as large, two batches in the place of one: the same loss."""
    model, x = toast.wrap(vit()), images(4)
    traced = toast.trace(model, x, block_states=True)
    whole = toast.reconstruction_loss(model, traced)
    assert 0 < whole <= 4  # where it starts: at most ‖out − in‖² against the mean of the two
    traced.states = {block: (a * 1e3, b * 1e3) for block, (a, b) in traced.states.items()}
    torch.testing.assert_close(toast.reconstruction_loss(model, traced), whole, rtol=1e-12, atol=0)
    halves = [
        toast.reconstruction_loss(model, toast.trace(model, part, block_states=True)) for part in x.split(2)
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-12, atol=0)


def test_the_gradient_of_the_relative_reconstruction_is_that_of_finite_differences() -> None:
    model = steered()
    traced = toast.trace(model, images(2), block_states=True)
    weight = to_state(model, 1)
    (gradient,) = torch.autograd.grad(toast.reconstruction_loss(model, traced), weight)
    direction, step = torch.randn_like(weight), 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            values.append(toast.reconstruction_loss(model, traced))
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-7, atol=1e-10)


def test_tokens_without_size_and_half_precision_give_finite_losses() -> None:
    model = steered()
    traced = toast.trace(model, images(2), block_states=True)
    traced.states = {block: (a * 0, b * 0) for block, (a, b) in traced.states.items()}
    loss = toast.reconstruction_loss(model, traced)
    (gradient,) = torch.autograd.grad(loss, to_state(model, 0))
    assert loss == 0 and not gradient.any()

    model = toast.wrap(vit()).half()  # squares of its states are beyond what half precision can hold
    traced = toast.trace(model.float(), images(2).float(), block_states=True)
    expected = toast.reconstruction_loss(model, traced)
    traced.states = {
        block: tuple((state * 1e3).half() for state in pair) for block, pair in traced.states.items()
    }
    loss = toast.reconstruction_loss(model.half(), traced)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("read", [toast.ToastConfig, PeftConfig])
def test_an_adapter_that_was_saved_without_a_form_has_the_official_one(read: Any, tmp_path: Path) -> None:
    steered(reconstruction_scale=0.1, **OFFICIAL).save_pretrained(tmp_path)
    place = tmp_path / "adapter_config.json"
    settings = json.loads(place.read_text())
    assert settings.pop("reconstruction_form") == "official"
    place.write_text(json.dumps(settings))
    config = read.from_pretrained(str(tmp_path))
    assert (config.reconstruction_form, config.reconstruction_scale) == ("official", 0.1)
    assert toast.ToastConfig().reconstruction_form == "relative"
    assert all(
        toast.ToastConfig.official(v).reconstruction_form == "official" for v in ("vision", "convnext-lite")
    )
    with pytest.raises(ValueError, match=r"reconstruction_scale: needs reconstruction_form='official'.*0\.1"):
        toast.ToastConfig(reconstruction_scale=0.1)


def test_lite_reconstructs_through_its_factors() -> None:
    model, given = steered(lora_rank=2, lora_alpha=3.0, **OFFICIAL), inputs("vit")
    traced = toast.trace(model, **given, block_states=True)
    expected = torch.zeros((), dtype=torch.float64)
    for block, value in enumerate(find_steering(model).values):
        lora = value.toast_to_state["default"]
        weight = lora.base_layer.weight + 1.5 * lora.lora_B.low_rank.weight @ lora.lora_A.low_rank.weight
        entering, leaving = traced.states[block]
        expected = expected + (leaving @ weight.T - entering).square().mean()
    found = toast.reconstruction_loss(model, traced)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "reached"), [({"train": "all"}, "to_state"), ({"lora_rank": 2, "train": "all"}, "to_state")]
)
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_the_gradient_of_the_reconstruction_reaches_only_to_state(
    kind: str, options: dict[str, Any], reached: str
) -> None:
    model = steered(kind, **options)
    toast.reconstruction_loss(model, toast.trace(model, **inputs(kind), block_states=True)).backward()
    for name, parameter in trained(model).items():
        if reached in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_reconstruction_under_autocast_is_finite_and_near() -> None:
    model, given = steered().float(), {"x": images(2).float()}
    fine = toast.reconstruction_loss(model, toast.trace(model, **given, block_states=True))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = toast.reconstruction_loss(model, toast.trace(model, **given, block_states=True))
    assert coarse.item() == pytest.approx(fine.item(), rel=0.05)


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_pre_training_takes_the_mean_of_both_heads_and_the_weighted_reconstruction(weight: float) -> None:
    model, given = steered(reconstruction_weight=weight, modules_to_save=["head"]), inputs("vit")
    labels = torch.tensor([1, 3])

    def task_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    loss, parts = toast.pretraining_loss(model, given["x"], task_loss=task_loss)
    steered_output = model(given["x"])
    head = model.base_model.model.head.modules_to_save["default"]
    with model.disable_adapter():
        features = model.base_model.model.forward_features(given["x"])[:, 0]
    first = task_loss(features @ head.weight.T + head.bias)  # the head that is trained, in both passes
    second = task_loss(steered_output)
    traced = toast.trace(model, given["x"], block_states=True)
    reconstruction = toast.reconstruction_loss(model, traced)
    assert parts.keys() == {"first_task", "task", "reconstruction"}
    for name, expected in (("first_task", first), ("task", second), ("reconstruction", reconstruction)):
        assert not parts[name].requires_grad
        torch.testing.assert_close(parts[name], expected.detach(), rtol=1e-12, atol=0)
    expected_loss = (first + second) / 2 + weight * reconstruction
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    names = list(trained(model))
    found = torch.autograd.grad(loss, list(trained(model).values()))
    expected_gradients = torch.autograd.grad(expected_loss, list(trained(model).values()))
    assert any("head" in name for name in names)
    for name, gradient, expected in zip(names, found, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_pre_training_of_a_language_model_takes_its_own_loss() -> None:
    model, text = steered("llama"), tokens(2)
    loss, parts = toast.pretraining_loss(
        model, input_ids=text, labels=text, use_cache=False, task_loss=lambda output: output.loss
    )
    with model.disable_adapter():
        assert torch.equal(parts["first_task"], model(input_ids=text, labels=text).loss.detach())
    assert torch.equal(parts["task"], model(input_ids=text, labels=text).loss.detach())
    loss.backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_what_lacks_states_is_refused() -> None:
    model, x = steered(), images(2)
    with pytest.raises(ValueError, match="needs the states of all blocks"):
        toast.reconstruction_loss(model, toast.trace(model, x))
    traced = toast.trace(model, x, block_states=True)
    with pytest.raises(ValueError, match="active TOAST adapter"):
        toast.reconstruction_loss(vit(), traced)
    with model.disable_adapter(), pytest.raises(ValueError, match="active TOAST adapter"):
        toast.reconstruction_loss(model, traced)
    with pytest.raises(ValueError, match="active TOAST adapter"):
        toast.pretraining_loss(vit(), x, task_loss=torch.sum)

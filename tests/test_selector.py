"""A selector that starts alive, and says so when it is not."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import toast
from tests.models import decoder, images, tokens, vit
from toast.steering import find_steering


def sharing_a_direction(**options: Any) -> Any:
    """A language model whose features all have the same sign, as those of trained ones share a direction."""
    bare = decoder("gpt2", **options)
    norm = bare.transformer.ln_f
    with torch.no_grad():
        norm.weight.mul_(0.1)
        norm.bias.fill_(1.0)
    return bare


@pytest.mark.parametrize("seed", range(8))
def test_a_fresh_selector_lives_on_its_first_input(seed: int) -> None:
    bare, text = sharing_a_direction(), tokens(1, 3)
    torch.manual_seed(seed)
    model = toast.wrap(bare).train()
    weights = toast.trace(model, input_ids=text, use_cache=False).selection_weights
    assert (weights > 0).all()
    model(input_ids=text, use_cache=False).logits.square().mean().backward()
    model.zero_grad()
    with torch.no_grad():
        for value in find_steering(model).values:
            torch.nn.init.normal_(value.toast_to_signal["default"].weight)
    model(input_ids=text, use_cache=False).logits.square().mean().backward()
    assert find_steering(model).selector.toast_task_embedding["default"].grad.abs().max() > 0


def test_starcoder2() -> None:
    config = transformers.Starcoder2Config(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    for seed in range(6):
        torch.manual_seed(seed)
        model = toast.wrap(transformers.AutoModelForCausalLM.from_config(config))
        assert toast.trace(model, input_ids=tokens(1, 2), use_cache=False).selection_weights.any()


def test_only_a_fresh_start_is_turned_round() -> None:
    bare, text = sharing_a_direction(), tokens(1, 3)
    model = toast.wrap(bare).eval()
    embedding = find_steering(model).selector.toast_task_embedding["default"]
    away = torch.full_like(embedding, -1.0)

    def after_a_call(model: Any) -> torch.Tensor:
        model(input_ids=text, use_cache=False)
        return find_steering(model).selector.toast_task_embedding["default"].detach().clone()

    chosen, loaded, copied = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        find_steering(chosen).selector.toast_task_embedding["default"].copy_(away)
    state = {name: away if "task_embedding" in name else t for name, t in loaded.state_dict().items()}
    loaded.load_state_dict(state)
    assert torch.equal(after_a_call(chosen), away)  # somebody has chosen it
    assert torch.equal(after_a_call(loaded), away)
    drawn = embedding.detach().clone()
    assert torch.equal(after_a_call(model).abs(), drawn.abs())
    assert torch.equal(after_a_call(model), after_a_call(copied))


def test_nothing_selected_in_training_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = toast.wrap(vit()), images(2)
    selector = find_steering(model).selector
    toast.calibrate(model, x)
    with torch.no_grad():
        selector.toast_task_embedding["default"].neg_()
        selector.base_layer.weight.zero_()  # all features are the bias
        selector.base_layer.bias.copy_(-selector.toast_task_embedding["default"])
    with caplog.at_level(logging.WARNING, "toast.selector"):
        model.eval()(x)
        assert not caplog.records
        model.train()
        for _ in range(5):
            model(x)
    (record,) = caplog.records
    assert "selects no token" in record.getMessage()
    assert "toast.calibrate" in record.getMessage()


def dead(seed: int, **options: Any) -> tuple[Any, torch.Tensor]:
    """A fresh model whose draw points away from all features."""
    torch.manual_seed(seed)
    model = toast.wrap(sharing_a_direction(**options)).eval()
    embedding = find_steering(model).selector.toast_task_embedding["default"]
    if embedding.mean() > 0:  # the features are all about 1
        embedding.data.neg_()
        find_steering(model).selector.start.keep("default", embedding)
    return model, tokens(1, 3)


def selected(model: Any, text: torch.Tensor) -> torch.Tensor:
    return toast.trace(model, input_ids=text, use_cache=False).selection_weights


def test_a_cast_a_copy_and_nothing_finite_before_the_first_call() -> None:
    model, text = dead(0)
    assert selected(copy.deepcopy(model).bfloat16(), text).all()
    assert selected(copy.deepcopy(model).float(), text).all()
    broken = torch.full((1, 3, 24), torch.nan, dtype=torch.float64)
    model(inputs_embeds=broken, use_cache=False)
    assert selected(model, text).all()


def test_what_is_loaded_is_never_turned_round(tmp_path: Path) -> None:
    model, text = dead(0)
    model.save_pretrained(tmp_path)
    loaded, _ = dead(0)  # drawn alike
    loaded.load_adapter(str(tmp_path), "default")
    loaded.eval()
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(sharing_a_direction(), str(tmp_path)).eval()
    for each in (loaded, again):
        assert not selected(each, text).any()


@pytest.mark.filterwarnings("ignore")  # tracing warns of much
def test_traced_and_called_with_other_weights() -> None:
    model, text = dead(0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = copy.deepcopy(weights)
    torch.func.functional_call(model, weights, (), {"input_ids": text, "use_cache": False})
    assert all(torch.equal(weights[name], before[name]) for name in weights)

    vision, x = toast.wrap(vit()).eval().requires_grad_(False), images(2)
    for seed in range(4):
        torch.manual_seed(seed)
        find_steering(vision).selector.toast_task_embedding["default"].copy_(torch.randn(24))
        find_steering(vision).selector.start.keep(
            "default", find_steering(vision).selector.toast_task_embedding["default"]
        )
        traced = torch.jit.trace(vision, x, check_trace=False)
        assert torch.equal(traced(x), traced(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_is_compiled_before_its_first_call(backend: str) -> None:
    torch._dynamo.reset()
    model, text = dead(0, num_hidden_layers=1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        found, expected = (each(input_ids=text, use_cache=False).logits for each in (compiled, twin))
        torch.testing.assert_close(found, expected)
    embeddings = [find_steering(each).selector.toast_task_embedding["default"] for each in (model, twin)]
    assert torch.equal(*embeddings)
    assert selected(model, text).all()
    torch._dynamo.reset()

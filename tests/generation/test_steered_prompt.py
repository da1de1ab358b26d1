"""`steer_tokens="prompt"`: both passes over the prompt, one for each token behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import toast
from tests.models import CACHE, DEPTH, awaken, decoder, tokens
from toast.passes import Observer
from toast.signals import Signal
from toast.steering import find_steering
from toast.thread_state import observing

FAMILIES = ["llama", "gpt2", "qwen2"]
OPTIONS: list[dict[str, Any]] = [{}, {"steer_from": 1}, {"select_from": 1}, {"lora_rank": 2}]


def steered(family: str = "llama", **options: Any) -> Any:
    """A tiny decoder, wrapped, whose signals are not zero."""
    torch.manual_seed(0)
    model = awaken(toast.wrap(decoder(family), steer_tokens="prompt", **options)).eval()
    toast.calibrate(model, input_ids=tokens(), use_cache=False)
    return model


class _Prompt(Observer):
    """Takes the signals from all tokens behind the prompt."""

    def __init__(self, length: int) -> None:
        self.length = length

    def on_signals(self, signals: dict[int, Signal]) -> dict[int, Signal]:
        held: dict[int, Signal] = {}
        for number, signal in signals.items():
            assert isinstance(signal, Tensor)
            held[number] = signal * (torch.arange(signal.shape[1]) < self.length)[None, :, None]
        return held


@torch.no_grad()
def in_steps(model: Any, text: Tensor, sizes: list[int], cache: Any = None) -> Tensor:
    """The logits of a text that comes in parts."""
    past = DynamicCache(config=model.get_base_model().config) if cache is None else cache
    parts = [model(part, **{CACHE: past}, use_cache=True).logits for part in text.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_one_call_whose_signals_end_with_the_prompt(family: str, options: dict[str, Any]) -> None:
    model, text = steered(family, feedback_form="per_token", **options), tokens(2, 8)
    with torch.no_grad(), observing(find_steering(model), _Prompt(4)):
        expected = model(text, use_cache=False).logits
    found = in_steps(model, text, [4, 1, 3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    everywhere = model(text, use_cache=False).logits
    assert torch.allclose(found[:, :4], everywhere[:, :4])
    assert not torch.allclose(found[:, 4:], everywhere[:, 4:])


def test_generation_takes_one_pass_a_token() -> None:
    model, text, passes = steered(), tokens(2, 5), []
    find_steering(model).blocks[0].register_forward_hook(lambda *_: passes.append(toast.running_pass()))
    found = model.generate(text, max_new_tokens=4, do_sample=False)
    assert passes == [1, 2, 0, 0, 0]
    with torch.no_grad():
        expected = text
        for _ in range(4):  # each token anew, in one call
            with observing(find_steering(model), _Prompt(5)):
                logits = model(expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_beams_and_static_caches(how: dict[str, Any]) -> None:
    model, text = steered(), tokens(2, 5)
    found = model.generate(text, max_new_tokens=4, do_sample=False, **how)
    again = model.generate(text, max_new_tokens=4, do_sample=False, **how)
    assert torch.equal(found, again)  # a static cache is used again, from its beginning
    if "num_beams" not in how:
        assert torch.equal(found, model.generate(text, max_new_tokens=4, do_sample=False))


def test_a_static_cache_takes_a_prompt_and_tokens() -> None:
    model, text = steered(), tokens(1, 7)
    config = model.get_base_model().config
    static = in_steps(model, text, [5, 1, 1], StaticCache(config=config, max_cache_len=8))
    torch.testing.assert_close(static, in_steps(model, text, [5, 1, 1]), rtol=0, atol=1e-9)


def test_training_and_calls_without_a_cache_steer_all() -> None:
    model, text = steered(), tokens(2, 6)
    alike = steered()
    alike.peft_config["default"].steer_tokens = "all"
    assert torch.equal(model(text, use_cache=False).logits, alike(text, use_cache=False).logits)


def test_it_is_saved_and_refused(tmp_path: Any) -> None:
    model = steered()
    model.save_pretrained(tmp_path)
    assert toast.ToastConfig.from_pretrained(str(tmp_path)).steer_tokens == "prompt"
    with pytest.raises(ValueError, match="steer_tokens: needs one of 'all', 'prompt'; got 'answer'"):
        toast.ToastConfig(steer_tokens="answer")
    assert len(find_steering(model).blocks) == DEPTH

"""A trunk takes its cache under the newer or the older name, or none; never one for both passes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

import toast
from tests.models import CACHE, DEPTH, VOCABULARY, WIDTH, awaken, decoder, tokens
from toast.calls.arguments import CACHE_NAMES, cache_name, under_name
from toast.steering import find_steering


class NewerTrunk(LlamaModel):
    """Takes its cache as `cache`, whatever the library says."""

    def forward(self, input_ids: Any = None, cache: Any = None, use_cache: Any = None, **more: Any) -> Any:
        return super().forward(input_ids, **{CACHE: cache}, use_cache=use_cache, **more)


class OlderTrunk(LlamaModel):
    """Takes its cache as `past_key_values`, as code does that models bring along."""

    def forward(
        self, input_ids: Any = None, past_key_values: Any = None, use_cache: Any = None, **more: Any
    ) -> Any:
        return super().forward(input_ids, **{CACHE: past_key_values}, use_cache=use_cache, **more)


class NamelessTrunk(LlamaModel):
    """Hands on whatever comes, under a name of its own."""

    def forward(self, input_ids: Any = None, memory: Any = None, use_cache: Any = None, **more: Any) -> Any:
        return super().forward(input_ids, **({CACHE: memory} | more), use_cache=use_cache)


def steered(trunk: type, **options: Any) -> Any:
    """The trunk, with the weights of a tiny Llama, wrapped."""
    torch.manual_seed(0)
    plain = decoder().model
    bare = trunk(plain.config).double().eval()
    bare.load_state_dict(plain.state_dict())
    model = awaken(toast.wrap(bare, select_features="unnormed", **options)).eval()
    toast.calibrate(model, input_ids=tokens(), use_cache=False)
    return model


def in_steps(model: Any, text: Tensor, keyword: str) -> tuple[Tensor, Any]:
    """The states of a text that comes in three parts, and the cache that they leave."""
    past, found = DynamicCache(config=model.get_base_model().config), []
    for part in text.split([4, 1, 3], dim=1):
        output = model(input_ids=part, **{keyword: past}, use_cache=True)
        assert getattr(output, CACHE) is past
        found.append(output.last_hidden_state)
    return torch.cat(found, 1), past


@pytest.mark.parametrize("steer_from", [0, 1])
@pytest.mark.parametrize("keyword", CACHE_NAMES)
@pytest.mark.parametrize("trunk", [NewerTrunk, OlderTrunk])
@torch.no_grad()
def test_either_name_gives_each_pass_a_cache(trunk: type, keyword: str, steer_from: int) -> None:
    model, text = steered(trunk, steer_from=steer_from), tokens(2, 8)
    whole = model(input_ids=text, use_cache=False).last_hidden_state
    with model.disable_adapter():
        assert (model(input_ids=text, use_cache=False).last_hidden_state - whole).abs().max() > 1e-2
    found, past = in_steps(model, text, keyword)
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    assert [layer.get_seq_length() for layer in past.layers] == [8] * (2 * DEPTH - steer_from)


@torch.no_grad()
def test_a_trunk_makes_its_own_cache_under_its_name() -> None:
    for trunk in (NewerTrunk, OlderTrunk):
        past = getattr(steered(trunk)(input_ids=tokens(2, 8), use_cache=True), CACHE)
        assert [layer.get_seq_length() for layer in past.layers] == [8] * (2 * DEPTH)


def test_the_name_is_that_of_the_signature() -> None:
    trunk = decoder().model
    assert cache_name(inspect.signature(trunk.forward).parameters) == CACHE
    assert cache_name(inspect.signature(OlderTrunk.forward).parameters) == "past_key_values"
    assert cache_name(inspect.signature(NamelessTrunk.forward).parameters) is None
    model = toast.wrap(decoder())
    assert find_steering(model).methods["forward"].cache_name == CACHE


def test_two_caches_are_refused() -> None:
    one, other = DynamicCache(), DynamicCache()
    assert under_name("cache", {"past_key_values": one, "cache": None, "x": 1}) == {"x": 1, "cache": one}
    assert under_name("past_key_values", {"past_key_values": one, "cache": one}) == {"past_key_values": one}
    assert under_name("cache", {"past_key_values": None}) == {"cache": None}
    with pytest.raises(ValueError, match="cache: needs one cache; another came as past_key_values"):
        under_name("cache", {"past_key_values": one, "cache": other})


@pytest.mark.parametrize("keyword", ["memory", *CACHE_NAMES])
def test_a_cache_of_no_known_name_is_refused(keyword: str) -> None:
    model, past = steered(NamelessTrunk), DynamicCache()
    with pytest.raises(ValueError, match=rf"{keyword}: .* NamelessTrunk has none of the arguments"):
        model(input_ids=tokens(), **{keyword: past})
    assert not past.layers
    with pytest.raises(ValueError, match=r"use_cache: each of the two passes .* Pass no cache and use_cache"):
        model(input_ids=tokens(), use_cache=True)


@torch.no_grad()
def test_a_trunk_of_no_known_name_keeps_no_cache() -> None:
    model, text = steered(NamelessTrunk), tokens()
    assert model.get_base_model().config.use_cache
    output = model(input_ids=text)
    assert getattr(output, CACHE) is None
    assert torch.equal(output.last_hidden_state, steered(LlamaModel)(input_ids=text).last_hidden_state)


def test_a_cache_for_an_encoder_is_refused() -> None:
    config = BertConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=DEPTH, num_attention_heads=3,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    model = toast.wrap(BertModel(config))
    with pytest.raises(ValueError, match=rf"{CACHE}: .*BertModel is not a decoder"):
        model(input_ids=tokens(), **{CACHE: DynamicCache()})

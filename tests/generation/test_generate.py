"""`generate` of a wrapped causal language model: caches change no token, and what cannot work says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import toast
from tests.models import CACHE, DECODERS, DEPTH, awaken, decoder, tokens
from toast.steering import find_steering

KINDS = [*DECODERS, "gpt2"]


def steer(bare: Any, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero: the task embedding resembles what is read."""
    model = awaken(toast.wrap(bare, **({"select_features": "unnormed"} | options))).eval()
    toast.calibrate(model, input_ids=tokens(), use_cache=False)
    return model


def steered(kind: str = "llama", select_from: int | None = None) -> Any:
    return steer(decoder(kind), select_from=select_from)


def generate(model: Any, prompt: Tensor, count: int = 8, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": count, "disable_compile": True} | options
    return model.generate(input_ids=prompt, **options)


def blocks_of(model: Any) -> list[nn.Module]:
    return find_steering(model).blocks


# What a textbook would write, with nothing of this package in it.


def by_hand(model: Any, plain: Any, prompt: Tensor) -> Tensor:
    """Both passes over a bare model: the signals are added by forward functions that this test puts there."""
    weights = {name: p for name, p in model.named_parameters() if ".toast_" in name}
    gpt2 = hasattr(plain, "transformer")
    blocks = plain.transformer.h if gpt2 else plain.model.layers
    norm = plain.transformer.ln_f if gpt2 else plain.model.norm
    seen: list[Tensor] = []
    normed = find_steering(model).selector.configs["default"].select_features == "normed"
    handle = norm.register_forward_hook(lambda _, args, out: seen.append(out if normed else args[0]))
    plain(input_ids=prompt)
    handle.remove()

    def weight(part: str, block: int | None = None) -> Tensor:
        place = "" if block is None else f".{block}."
        return next(p for name, p in weights.items() if part in name and place in name)

    xi = weight("task_embedding")
    features = seen[0]
    cosine = (features @ xi) / (features.norm(dim=-1) * xi.norm())
    state = (cosine.clamp(0, 1)[..., None] * features) @ weight("channel_transform")
    width = features.shape[-1]
    for index in reversed(range(len(blocks))):
        state = state @ weight("to_state", index).T
        signal = state @ weight("to_signal", index).T
        if gpt2:
            attend, linear = blocks[index].attn, blocks[index].attn.c_attn

            def fused(x: Tensor, linear: Any = linear, signal: Tensor = signal) -> Tensor:
                query_key = x @ linear.weight[:, : 2 * width] + linear.bias[: 2 * width]
                value = (x + signal) @ linear.weight[:, 2 * width :] + linear.bias[2 * width :]
                return torch.cat([query_key, value], dim=-1)

            attend.c_attn.forward = fused
        else:
            linear = blocks[index].self_attn.v_proj
            linear.forward = lambda x, linear=linear, signal=signal: F.linear(
                x + signal, linear.weight, linear.bias
            )
    return plain(input_ids=prompt).logits


@pytest.mark.parametrize("features", ["normed", "unnormed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_two_passes_by_hand(kind: str, features: str) -> None:
    bare = decoder(kind)
    weights = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    model = steer(bare, select_features=features)
    plain = decoder(kind)
    plain.load_state_dict(weights)
    prompt = tokens()
    unsteered = plain(input_ids=prompt).logits
    found, expected = model(input_ids=prompt).logits, by_hand(model, plain, prompt)
    assert (found - unsteered).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# A cache changes no token.

MANNERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("kind", "manner"),
    [*((kind, manner) for kind in KINDS for manner in ("greedy", "beams")), ("llama", "sampling")],
)
def test_tokens_with_a_cache_are_those_without(kind: str, manner: str) -> None:
    model, prompt = steered(kind), tokens(2)

    def run(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return generate(model, prompt, **(MANNERS[manner] | options))

    without = run(use_cache=False)
    assert without.shape == (2 * MANNERS[manner].get("num_return_sequences", 1), 17)
    assert torch.equal(run(use_cache=True), without)
    with model.disable_adapter():
        assert not torch.equal(run(), without)  # else nothing was steered


def test_sampling_repeats_with_its_seed_only() -> None:
    model, prompt = steered(), tokens(2)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(generate(model, prompt, do_sample=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"num_beams": 3}) for kind in KINDS),
        *((kind, {}) for kind in ("llama", "mistral", "gpt2")),
        *((kind, {"cache_implementation": "static"}) for kind in ("llama", "mistral", "gpt2")),
    ],
    ids=str,
)
def test_a_padded_row_gives_the_tokens_of_the_row_alone(kind: str, options: dict[str, Any]) -> None:
    model, prompt = steered(kind), tokens(2)
    prompt[0, :4] = 0
    together = generate(model, prompt, attention_mask=(prompt != 0).long(), **options)
    assert torch.equal(together[0, 4:], generate(model, prompt[:1, 4:], **options)[0])
    assert torch.equal(together[1:], generate(model, prompt[1:], **options))


CACHES: dict[str, Callable[[Any], Any]] = {
    "its own": lambda model: None,
    "without configuration": lambda model: DynamicCache(),
    "with configuration": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=32),
}


@pytest.mark.parametrize("select_from", [None, 0, 1])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llama-grouped", "mistral", "gpt2"])
@torch.no_grad()
def test_logits_of_chunks_are_those_of_the_whole_text(kind: str, cache: str, select_from: int | None) -> None:
    model, text = steered(kind, select_from), tokens(2, 16)
    whole = model(input_ids=text, use_cache=False).logits
    past, found = CACHES[cache](model.base_model.model), []
    for chunk in text.split([7, 1, 5, 1, 2], dim=1):
        length = 0 if past is None else past.get_seq_length()
        mask = torch.ones(2, length + chunk.shape[1], dtype=torch.long)
        out = model(input_ids=chunk, attention_mask=mask, **{CACHE: past}, use_cache=True)
        past = getattr(out, CACHE)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-11, atol=1e-11)
    assert len(past.layers) == DEPTH + (DEPTH if select_from is None else select_from + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "select_from"), [("llama", 1), ("mistral", None), ("mistral", 1), ("gpt2", None)]
)
def test_every_way_of_caching_gives_the_same_tokens(
    kind: str, select_from: int | None, options: dict[str, Any]
) -> None:
    model = steered(kind, select_from)
    prompt = tokens(1, 9) if "prompt_lookup_num_tokens" in options else tokens(2, 9)
    prompt[:, 5:] = prompt[:, :4]  # something to look up
    expected = generate(model, prompt, 10, use_cache=False, num_beams=options.get("num_beams", 1))
    for _ in range(2):  # nothing of the first generation is left for the second
        assert torch.equal(generate(model, prompt, 10, **options), expected)


@pytest.mark.parametrize("cache", ["without configuration", "with configuration", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_takes_a_given_cache_and_can_go_on_with_it(cache: str, beams: int) -> None:
    model, prompt = steered("llama-grouped", select_from=1), tokens(2)
    expected = generate(model, prompt, 10, use_cache=False, num_beams=beams)
    past = CACHES[cache](model.base_model.model)
    assert torch.equal(generate(model, prompt, 10, **{CACHE: past}, num_beams=beams), expected)
    if beams == 1:
        past = CACHES[cache](model.base_model.model)
        begun = generate(model, prompt, 4, **{CACHE: past})
        assert torch.equal(generate(model, begun, 6, **{CACHE: past}), expected)


@pytest.mark.parametrize("assistant_is_steered", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_an_assistant_changes_no_token(kind: str, assistant_is_steered: bool) -> None:
    assistant = steered(kind) if assistant_is_steered else decoder(kind)
    assistant = assistant.base_model.model if assistant_is_steered else assistant
    model, prompt = steered(kind, select_from=1), tokens(1)
    expected = generate(model, prompt, 10, use_cache=False)
    assert torch.equal(generate(model, prompt, 10, assistant_model=assistant), expected)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("select_from", [None, 0])
@torch.no_grad()
def test_reordering_repeating_and_cropping_act_on_both_passes(kind: str, select_from: int | None) -> None:
    model, text = steered(kind, select_from), tokens(3, 5)
    order = torch.tensor([2, 0, 1])
    past = getattr(model(input_ids=text, use_cache=True), CACHE)
    past.reorder_cache(order)
    past.crop(-2)
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([0, 3]))
    rest = tokens(2, 1)
    mask = torch.ones(2, 4, dtype=torch.long)
    found = model(input_ids=rest, attention_mask=mask, **{CACHE: past}).logits
    expected = model(input_ids=torch.cat([text[order[:2], :3], rest], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cache", ["with configuration", "static"])
@torch.no_grad()
def test_a_cache_that_was_reset_serves_again_and_with_another_adapter(cache: str) -> None:
    model, text = steered(), tokens()
    config = toast.ToastConfig(select_from=0)
    model.add_adapter("lower", config)
    awaken(model)
    past = CACHES[cache](model.base_model.model)
    for adapter in ("default", "lower", "default"):
        model.set_adapter(adapter)
        whole = model(input_ids=text, use_cache=False).logits
        for _ in range(2):
            past.reset()
            found = model(input_ids=text, **{CACHE: past}).logits
            torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_cache_initialised_early_is_not_shared_between_the_passes() -> None:
    model, text = steered(), tokens()
    past = StaticCache(model.base_model.model.config, max_cache_len=16)
    past.early_initialization(3, 3, 8, torch.float64, torch.device("cpu"))
    whole = model(input_ids=text, use_cache=False).logits
    found = model(input_ids=text, **{CACHE: past}).logits
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_it_generates_the_tokens_of_the_bare_model(kind: str) -> None:
    bare, prompt = decoder(kind), tokens()
    expected = generate(bare, prompt)
    model = steer(bare)
    steered_tokens = generate(model, prompt)
    with model.disable_adapter():
        assert torch.equal(generate(model, prompt), expected)
        assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert torch.equal(generate(model, prompt), steered_tokens)


# What cannot work says so before it starts.


def offloaded(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # as `DynamicCache(offloading=True)`, which needs an accelerator
    return cache


def filled_unsteered(model: Any) -> DynamicCache:
    with model.disable_adapter():
        return getattr(model(input_ids=tokens(), use_cache=True), CACHE)


def filled_by_another(model: Any) -> DynamicCache:
    past = getattr(model(input_ids=tokens(), use_cache=True), CACHE)
    model.add_adapter("other", toast.ToastConfig())
    model.set_adapter("other")
    return past


def of_another_depth(depth: int) -> DynamicCache:
    return DynamicCache(config=decoder(num_hidden_layers=depth).config)


def half_disabled(model: Any) -> DynamicCache:
    past = getattr(model(input_ids=tokens(), use_cache=True), CACHE)
    with model.disable_adapter():
        model(input_ids=tokens(), **{CACHE: past})
    return past


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (offloaded, ValueError, "does not work with offloaded caches"),
        (
            lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
            TypeError,
            "needs a Cache of a decoder.*got EncoderDecoderCache",
        ),
        (lambda model: ((torch.zeros(3, 3, 2, 8),) * 2,) * 3, TypeError, "needs a Cache of a .*got tuple"),
        (lambda model: of_another_depth(2), ValueError, "2 layers.*3 blocks"),
        (lambda model: of_another_depth(4), ValueError, "4 layers.*3 blocks"),
        (filled_unsteered, ValueError, "was filled without steering"),
        (filled_by_another, ValueError, "was filled with adapter 'default'; the active one is 'other'"),
        (half_disabled, ValueError, "hold 9 and 9 tokens of the first pass, 18 and 18 of the second"),
    ],
)
def test_a_cache_that_cannot_serve_is_refused_first(make: Any, error: type, message: str) -> None:
    model = steered()
    past = make(model)
    ran: list[int] = []
    blocks_of(model)[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message):
        model.base_model.model.model(input_ids=tokens(), **{CACHE: past}, use_cache=True)
    assert not ran


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("fails_at", "message"), [(2, "9 and 0 .* 0 and 0"), (5, "9 and 9 .* 9 and 0")])
@torch.no_grad()
def test_a_cache_torn_by_a_failure_is_refused(fails_at: int, message: str, static: bool) -> None:
    model = steered()
    past = CACHES["static" if static else "with configuration"](model.base_model.model)
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == (1 if fails_at == 2 else 2):
            raise KeyboardInterrupt

    handle = blocks_of(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens(), **{CACHE: past})
    handle.remove()
    with pytest.raises(ValueError, match=message):
        model(input_ids=tokens(), **{CACHE: past})
    past.reset()
    text = tokens()
    again = model(input_ids=text, **{CACHE: past}).logits
    torch.testing.assert_close(again, model(input_ids=text, use_cache=False).logits, rtol=1e-11, atol=1e-11)

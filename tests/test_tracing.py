"""`toast.trace` shows what happened in the two passes, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

import toast
from tests.models import CACHE, DECODERS, DEPTH, VITS, WIDTH, awaken, decoder, images, tokens, vit
from toast.steering import find_steering
from toast.thread_state import current_observer, observing
from toast.tracing import AttentionMode, _Recorder, attention_map

DECODER_KINDS = [*DECODERS, "gpt2"]
# The kinds of VITS whose blocks differ in what attention sees.
VIT_KINDS = [kind for kind in VITS if kind in ("class-token", "registers-layer-scale", "qk-norm", "average")]


def steer(bare: Any, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero: the task embedding resembles what is read."""
    model = awaken(toast.wrap(bare, **options)).eval()
    with torch.no_grad():
        if hasattr(bare, "generate"):
            toast.calibrate(model, input_ids=tokens(), use_cache=False)
        else:
            toast.calibrate(model, images())
    return model


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Names and shapes.


def test_all_of_a_vit_by_name() -> None:
    model, x = steer(vit()), images(2)
    traced = toast.trace(model, x, attention_blocks="all", block_states=True)
    count = 17
    assert traced.features.shape == traced.selected.shape == (2, count, WIDTH)
    assert traced.selection_weights.shape == (2, count)
    assert 0 <= traced.selection_weights.min() < traced.selection_weights.max() <= 1
    assert [signal.shape for signal in traced.signals] == [(2, count, WIDTH)] * DEPTH
    assert list(traced.attention) == list(traced.first_attention) == [*range(DEPTH)]
    for maps in (traced.attention, traced.first_attention):
        assert all(attention.shape == (2, 3, count, count) for attention in maps.values())
    assert [*traced.states] == [*range(DEPTH)]
    for block in range(DEPTH - 1):
        assert torch.equal(traced.states[block][1], traced.states[block + 1][0])
    assert traced.output.shape == traced.first_output.shape == (2, 5)


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_the_output_after_the_first_pass_is_the_bare_models(kind: str) -> None:
    model, x = steer(decoder(kind)), tokens()
    traced = toast.trace(model, input_ids=x, labels=x)
    with model.disable_adapter():
        bare = model(input_ids=x, labels=x)
    assert torch.equal(traced.first_output.logits, bare.logits)
    assert torch.equal(traced.first_output.loss, bare.loss)
    assert not torch.equal(traced.output.logits, bare.logits)


# Attention.


# The eager attention of transformers computes its softmax in float32, whatever the model's type.
ROUNDED = 2e-5


def eager_maps(model: Any, eager: Any, number: int, **inputs: Any) -> tuple[Tensor, ...]:
    """The attentions that transformers itself returns, of the pass with the given number."""
    for source, target in zip(model.parameters(), eager.parameters(), strict=True):
        target.data.copy_(source.data)
    if number == 2:
        return eager(**inputs, output_attentions=True).attentions
    with eager.disable_adapter():
        return eager(**inputs, output_attentions=True).attentions


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", DECODER_KINDS)
@torch.no_grad()
def test_the_maps_of_a_decoder_are_those_that_transformers_returns(
    kind: str, padded: bool, implementation: str
) -> None:
    # In float64 the eager attention makes NaN of padding: its mask overflows in the float32 softmax.
    dtype = torch.float32 if padded else torch.float64
    model = steer(decoder(kind, dtype, attn_implementation=implementation))
    eager = toast.wrap(decoder(kind, dtype, attn_implementation="eager")).eval()
    inputs: dict[str, Any] = {"input_ids": tokens(), "use_cache": False}
    seen = torch.ones(3, 9, dtype=torch.long)
    if padded:
        seen[0, :4] = 0
        inputs |= {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    traced = toast.trace(model, **inputs, attention_blocks="all")
    real = seen.bool()[:, None].expand(3, 3, 9)  # what a padding token attends to is not defined
    for number, maps in ((1, traced.first_attention), (2, traced.attention)):
        expected = eager_maps(model, eager, number, **inputs)
        for block in range(DEPTH):
            assert maps[block].shape == expected[block].shape == (3, 3, 9, 9)
            found = maps[block][real].double()
            assert_near(found, expected[block][real].double(), 0 if implementation == "eager" else ROUNDED)
            assert_near(found.sum(-1), torch.ones(len(found), dtype=torch.float64), ROUNDED)
    assert not torch.equal(traced.attention[2], traced.first_attention[2])
    if kind == "mistral":
        assert traced.attention[0][0, 0, 8, :3].abs().max() == 0  # outside of the window


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_map_of_a_cached_step_is_the_last_row_of_the_whole_text(implementation: str) -> None:
    model, text = steer(decoder("llama-grouped", attn_implementation=implementation)), tokens()
    whole = toast.trace(model, input_ids=text, attention_blocks="all", use_cache=False)
    past = getattr(model(input_ids=text[:, :-1], use_cache=True), CACHE)
    step = toast.trace(model, input_ids=text[:, -1:], **{CACHE: past}, attention_blocks="all")
    for block in range(DEPTH):
        assert_near(step.attention[block], whole.attention[block][:, :, -1:], ROUNDED)
        assert_near(step.first_attention[block], whole.first_attention[block][:, :, -1:], ROUNDED)
    assert_near(step.output.logits[:, 0], whole.output.logits[:, -1], ROUNDED)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", VIT_KINDS)
@torch.no_grad()
def test_the_maps_of_a_vit_are_those_before_its_attention_dropout(kind: str, fused: bool) -> None:
    model, x = steer(vit(kind)), images(2)
    slow = copy.deepcopy(model)
    for fast, block in zip(find_steering(model).blocks, find_steering(slow).blocks, strict=True):
        fast.attn.fused_attn = fused
        block.attn.fused_attn = False
    seen: list[Tensor] = []
    for block in find_steering(slow).blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = slow(x)
    traced = toast.trace(model, x, attention_blocks="all")
    assert_near(traced.output, expected)
    for block in range(DEPTH):
        assert_near(traced.first_attention[block], seen[block])
        assert_near(traced.attention[block], seen[DEPTH + block])
        assert_near(traced.attention[block].sum(-1), torch.ones_like(seen[0][..., 0]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
@torch.no_grad()
def test_maps_under_autocast(kind: str, implementation: str) -> None:
    model = steer(decoder(kind, dtype=torch.float32, attn_implementation=implementation))
    fine, x = copy.deepcopy(model).double(), tokens()
    expected = toast.trace(fine, input_ids=x, attention_blocks=[0], use_cache=False)
    for context, tolerance in (
        (torch.autocast("cpu", enabled=False), 1e-5),
        (torch.autocast("cpu", torch.bfloat16), 5e-2),
    ):
        with context:
            traced = toast.trace(model, input_ids=x, attention_blocks="all", use_cache=False)
        for block in range(DEPTH):
            attention = traced.attention[block]
            assert attention.dtype == torch.float32
            assert_near(attention.sum(-1), torch.ones_like(attention[..., 0]), 1e-5)
        assert_near(traced.first_attention[0].double(), expected.first_attention[0].double(), tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.ones(5, 7).tril(1).bool()},
        {"attn_mask": torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, 7)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_map_times_the_values_is_the_attention_of_pytorch(options: dict[str, Any]) -> None:
    query, key, value = (torch.randn(2, heads, n, 6).double() for heads, n in ((4, 5), (2, 7), (2, 7)))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    found = attention_map(query, key, value, enable_gqa=True, **options)
    assert_near(found @ value[:, [0, 0, 1, 1]], expected)


def test_chosen_blocks_count_from_both_ends() -> None:
    model, x = steer(vit()), images(2)
    every = toast.trace(model, x, attention_blocks="all")
    some = toast.trace(model, x, attention_blocks=[-1, 0, 2])
    assert list(some.attention) == list(some.first_attention) == [0, 2]
    assert all(torch.equal(some.attention[block], every.attention[block]) for block in (0, 2))


def test_a_first_pass_that_ends_early_has_no_maps_above() -> None:
    traced = toast.trace(steer(vit(), select_from=1), images(2), attention_blocks="all")
    assert list(traced.first_attention) == [0, 1]
    assert list(traced.attention) == [0, 1, 2]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_maps_have_the_gradient_of_the_second_pass_only(implementation: str) -> None:
    model = steer(decoder(attn_implementation=implementation))
    traced = toast.trace(model, input_ids=tokens(), attention_blocks="all", use_cache=False)
    assert not any(attention.requires_grad for attention in traced.first_attention.values())
    assert traced.attention[2].requires_grad
    traced.attention[2].square().sum().backward()
    gradient = find_steering(model).selector.toast_task_embedding["default"].grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_softmax_after_the_attention_is_not_taken_for_it() -> None:
    """Such as that of a router of experts, even if it has the shape of attention."""
    model, x = steer(vit()), images(2)
    expected = toast.trace(model, x, attention_blocks="all").attention

    def route(module: nn.Module, args: Any, out: Tensor) -> None:
        torch.zeros(2, 3, 17, 17).softmax(-1)

    for block in find_steering(model).blocks:
        block.mlp.register_forward_hook(route)
    found = toast.trace(model, x, attention_blocks="all").attention
    assert all(torch.equal(found[block], expected[block]) for block in range(DEPTH))


# Tracing changes nothing, and costs nothing where nothing is asked.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["vit", *DECODER_KINDS])
def test_tracing_changes_no_bit_of_the_output(kind: str, implementation: str) -> None:
    if kind == "vit":
        model, x = steer(vit()), images(2)
        for block in find_steering(model).blocks:
            block.attn.fused_attn = implementation == "sdpa"
        assert torch.equal(toast.trace(model, x, attention_blocks="all", block_states=True).output, model(x))
        return
    model, text = steer(decoder(kind, attn_implementation=implementation)), tokens()
    plain = model(input_ids=text, use_cache=False)
    traced = toast.trace(model, input_ids=text, use_cache=False, attention_blocks="all", block_states=True)
    assert torch.equal(traced.output.logits, plain.logits)


def test_without_maps_no_function_is_watched() -> None:
    model, x = steer(vit()), images(2)
    watched: list[bool] = []
    watch = lambda *_: watched.append(torch.overrides._get_current_function_mode() is not None)  # noqa: E731
    find_steering(model).blocks[0].register_forward_pre_hook(watch)
    model(x)
    traced = toast.trace(model, x, block_states=True)
    assert watched == [False] * 4
    assert traced.attention == traced.first_attention == {}
    toast.trace(model, x, attention_blocks=[0])
    assert watched[4:] == [True] * 2
    assert toast.trace(model, x).states == {}


def test_a_plain_call_has_no_observer() -> None:
    model, x = steer(vit()), images(2)
    steering = find_steering(model)
    observers: list[Any] = []
    steering.blocks[0].register_forward_pre_hook(lambda *_: observers.append(current_observer(steering)))
    model(x)
    assert observers == [None, None]
    toast.trace(model, x)
    assert all(isinstance(observer, _Recorder) for observer in observers[2:])
    recorder = _Recorder({0}, False)
    with observing(steering, recorder), AttentionMode(recorder.keep):
        assert current_observer(object()) is None
    assert current_observer(steering) is None


# What cannot be shown.


@pytest.fixture
def hidden_kernel() -> Iterator[str]:
    """An attention of which PyTorch sees no softmax, as of a fused kernel."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * options["scaling"]
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(above, -torch.inf).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bhkd->bqhd", weights, value), None

    AttentionInterface.register("hidden", attend)
    yield "hidden"
    AttentionInterface._global_mapping.pop("hidden")


def test_a_kernel_that_hides_its_queries_and_keys_is_named(hidden_kernel: str) -> None:
    model = steer(decoder(attn_implementation=hidden_kernel))
    with pytest.raises(ValueError, match=r"no attention was seen in block 1: .*'sdpa' or 'eager'"):
        toast.trace(model, input_ids=tokens(), attention_blocks=[1], use_cache=False)
    toast.trace(model, input_ids=tokens(), use_cache=False)


def test_what_cannot_be_traced_is_refused() -> None:
    model, x = steer(vit()), images(2)
    with pytest.raises(ValueError, match="active TOAST adapter; wrap it with"):
        toast.trace(vit(), x)
    with model.disable_adapter(), pytest.raises(ValueError, match="active TOAST adapter"):
        toast.trace(model, x)
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=rf"has steered blocks 0 to 2; got \[{wrong}\]"):
            toast.trace(model, x, attention_blocks=[0, wrong])


def test_a_call_that_runs_the_trunk_twice_or_never_is_refused() -> None:
    class Siamese(nn.Module):
        def __init__(self, model: nn.Module, runs: int) -> None:
            super().__init__()
            self.model, self.runs = model, runs

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.runs):
                x = x + self.model(x).mean()
            return x

    model = steer(vit())
    with pytest.raises(ValueError, match="ran the trunk more than once"):
        toast.trace(Siamese(model, 2), images(2))
    with pytest.raises(ValueError, match="did not run the steered trunk"):
        toast.trace(Siamese(model, 0), images(2))

"""`generate_batch`: one paged cache holds both passes and changes no token; what cannot work is refused."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import toast
from tests.generation.test_generate import generate, steer
from tests.models import DEPTH, awaken, decoder, tokens
from toast.generation import continuous_batching

if continuous_batching.unknown_parts():
    pytest.skip(f"needs {continuous_batching.unknown_parts()}", allow_module_level=True)

PAGE, NEW = 4, 10  # every request needs several pages


def settings(**options: Any) -> Any:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        **(
            {"page_size": PAGE, "num_blocks": 64, "max_batch_tokens": 32, "max_requests_per_batch": 8}
            | options
        )
    )


def greedy(copies: int = 1) -> Any:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config.num_return_sequences = copies
    return config


def prompts() -> list[list[int]]:
    """Of other lengths each; the last begins with two pages of another."""
    found = [tokens(1, length)[0].tolist() for length in (5, 11, 3)]
    return [*found, [*found[1][: 2 * PAGE], 3, 4]]


def run(model: Any, texts: list[list[int]], copies: int = 1, **options: Any) -> list[Any]:
    persistent = options.pop("persistent_manager", False)
    found = model.generate_batch(
        texts,
        generation_config=greedy(copies),
        continuous_batching_config=settings(**options),
        persistent_manager=persistent,
    )
    return list(found.values())


def in_batch(model: Any, texts: list[list[int]], **options: Any) -> list[list[int]]:
    return [each.generated_tokens for each in run(model, texts, **options)]


def one_by_one(model: Any, texts: list[list[int]]) -> list[list[int]]:
    return [generate(model, torch.tensor([text]), NEW)[0, len(text) :].tolist() for text in texts]


@torch.no_grad()
def assert_the_numbers_are_those_without_a_cache(model: Any, outputs: list[Any]) -> None:
    """A tiny model repeats itself, so that its tokens say little."""
    for each in outputs:
        text = torch.tensor([each.prompt_ids + each.generated_tokens])
        logits = model(input_ids=text, use_cache=False).logits[0, len(each.prompt_ids) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(each.generated_tokens)[:, None])
        torch.testing.assert_close(torch.tensor(each.logprobs), expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """Every manager that stops collects garbage twice, through all that the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The paged caches that are made."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    made: list[Any] = []
    own = PagedAttentionCache.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PagedAttentionCache, "__init__", keep)
    return made


SLIDING_ABOVE = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "layers"),
    [
        ("llama", {}, {}, 2 * DEPTH),
        ("llama-grouped", {"attn_implementation": "eager"}, {"lora_rank": 2}, 2 * DEPTH),
        ("llama", {}, {"steer_from": 2, "select_from": 0}, DEPTH),
        ("gpt2", {}, {"select_from": 1}, DEPTH + 2),
        ("mistral", {}, {"steer_from": 1}, 2 * DEPTH - 1),
        ("qwen2", SLIDING_ABOVE, {"steer_from": 1, "select_from": 1}, DEPTH + 1),
    ],
    ids=str,
)
def test_tokens_are_those_of_generate(
    kind: str, sizes: dict[str, Any], options: dict[str, Any], layers: int, caches: list[Any]
) -> None:
    model, texts = steer(decoder(kind, **sizes), **options), prompts()
    expected = one_by_one(model, texts)
    with model.disable_adapter():
        assert one_by_one(model, texts) != expected
    found = run(model, texts, max_batch_tokens=8, return_logprobs=True)  # prompts come in two chunks
    assert [each.generated_tokens for each in found] == expected
    assert_the_numbers_are_those_without_a_cache(model, found)
    (cache,) = caches
    assert len(cache.layer_to_allocator) == layers
    config = model.get_base_model().config
    assert config.num_hidden_layers == DEPTH
    assert config._attn_implementation == sizes.get("attn_implementation", "sdpa")


def test_fused_and_in_inference_mode() -> None:
    model, texts = steer(decoder()).requires_grad_(False), prompts()
    expected = one_by_one(model, texts)
    toast.fuse(model)
    with torch.inference_mode():
        found = run(model, texts, return_logprobs=True)
    assert [each.generated_tokens for each in found] == expected
    assert_the_numbers_are_those_without_a_cache(model, found)


def test_requests_that_share_prefixes_fork_and_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.cache import CacheAllocator

    shared: list[str] = []
    own = CacheAllocator.acquire_prefix_blocks

    def count(self: Any, request: str, *args: Any) -> None:
        shared.append(request)
        own(self, request, *args)

    monkeypatch.setattr(CacheAllocator, "acquire_prefix_blocks", count)
    model, texts = steer(decoder(), steer_from=1), prompts()
    expected = one_by_one(model, texts)
    options = {"persistent_manager": True, "return_logprobs": True}
    assert in_batch(model, texts, **options) == expected
    shared.clear()
    found = run(model, texts, **options)
    assert len(shared) == 3  # all prompts that fill a page
    assert [each.generated_tokens for each in found] == expected
    assert_the_numbers_are_those_without_a_cache(model, found)
    model.destroy_cached_continuous_batching_manager()
    assert in_batch(model, texts, copies=2) == [each for each in expected for _ in range(2)]
    assert in_batch(model, texts, num_blocks=7) == expected  # too few for all at once


# The adapter: that of the cache, or an error.


def test_a_manager_that_was_kept_serves_its_adapter_only() -> None:
    model, texts = steer(decoder()), prompts()
    in_batch(model, texts, persistent_manager=True)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"made for adapter 'default', and now none is active\. Stop"),
    ):
        in_batch(model, texts)
    model.destroy_cached_continuous_batching_manager()
    with model.disable_adapter():
        plain = one_by_one(model, texts)
        assert in_batch(model, texts, persistent_manager=True) == plain
        assert in_batch(model, texts) == plain
        in_batch(model, texts, persistent_manager=True)
    with pytest.raises(ValueError, match=r"made while no adapter was active, and now 'default' is active"):
        in_batch(model, texts)
    model.destroy_cached_continuous_batching_manager()
    in_batch(model, texts, persistent_manager=True)
    assert in_batch(model.unload(), texts) == plain


SWITCHES: dict[str, tuple[Callable[[Any], None], Callable[[Any], None], str]] = {
    "to another": (
        lambda model: None,
        lambda model: model.set_adapter("other"),
        "made for adapter 'default', and now 'other' is active",
    ),
    "off": (
        lambda model: None,
        lambda model: model.base_model.disable_adapter_layers(),
        "made for adapter 'default', and now none is active",
    ),
    "on": (
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        "made while no adapter was active, and now 'default' is active",
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_in_between_ends_in_an_error(switch: str, caplog: pytest.LogCaptureFixture) -> None:
    before, after, message = SWITCHES[switch]
    model = steer(decoder())
    model.add_adapter("other", toast.ToastConfig(select_features="unnormed"))
    awaken(model)
    before(model)
    steps = []

    def count(*_: Any) -> None:
        steps.append(0)
        if len(steps) == 4:
            after(model)

    model.get_base_model().lm_head.register_forward_hook(count)
    with caplog.at_level(logging.CRITICAL), pytest.raises(continuous_batching.SwitchedError, match=message):
        in_batch(model, prompts())
    assert len(steps) == 4


# What cannot work is refused before it starts.


def refused(model: Any, message: str, **options: Any) -> None:
    """Refuses while the adapter is active, leaves all as it was, and works while it is disabled."""
    texts = prompts()
    with pytest.raises(ValueError, match=rf"^continuous batching: .*{message}.*Use generate\(\), or disable"):
        in_batch(model, texts, **options)
    assert model.get_base_model().config._attn_implementation == "eager"
    assert one_by_one(model, texts[:1])
    with model.disable_adapter():
        assert len(in_batch(model, texts[:1])[0]) == NEW


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import initialization

    model = steer(decoder(attn_implementation="eager"))
    with monkeypatch.context() as other:
        other.setattr(continuous_batching, "_UPDATE", ["self", "cache"])
        refused(model, r"PagedAttentionCache.*transformers [\d.]+ has another")
    with monkeypatch.context() as other:
        other.setattr(initialization, "get_accelerator_graph_name", lambda: "a graph")
        with pytest.raises(ValueError, match="with use_cuda_graph=False or None"):
            in_batch(model, prompts(), use_cuda_graph=True)
        assert len(in_batch(model, prompts())) == 4
    monkeypatch.setattr(continuous_batching.Pages, "deepened", lambda self, config: config)
    refused(model, "need a paged cache of 6 layers; it was made with 3")


def test_a_configuration_that_counts_otherwise_is_refused() -> None:
    model = steer(decoder(attn_implementation="eager"))
    model.get_base_model().config.num_hidden_layers = DEPTH - 1
    with pytest.raises(ValueError, match=r"num_hidden_layers=2; the steered trunk has 3 blocks"):
        in_batch(model, prompts())


# Kernels of flash attention, which need an accelerator: others stand in that compute the same.


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    repeats, ahead = query.shape[1] // key.shape[1], key.shape[0] - query.shape[0]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(ahead)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def by_lengths(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float = 1.0,
    causal: bool = True, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> Tensor:  # fmt: skip
    queries, keys = (
        each.split((lengths[1:] - lengths[:-1]).tolist())
        for each, lengths in ((q, cu_seqlens_q), (torch.stack([k, v], 1), cu_seqlens_k))
    )
    return torch.cat(
        [attend(own, *kv.unbind(1), softmax_scale) for own, kv in zip(queries, keys, strict=True)]
    )


def by_table(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    block_table: Tensor, softmax_scale: float = 1.0, causal: bool = True,
) -> Tensor:  # fmt: skip
    found = []
    for row, length in enumerate(cache_seqlens.tolist()):
        at = [(int(block_table[row, each // PAGE]), each % PAGE) for each in range(length + 1)]
        pages, places = torch.tensor(at).unbind(1)
        k_cache[pages[-1], places[-1]], v_cache[pages[-1], places[-1]] = k[row, 0], v[row, 0]
        found.append(attend(q[row], k_cache[pages, places], v_cache[pages, places], softmax_scale))
    return torch.stack(found)


@pytest.mark.parametrize("table", [0, 16])
@pytest.mark.parametrize("options", [{}, {"steer_from": 1, "select_from": 1}], ids=str)
def test_the_paths_of_flash_attention(
    table: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_flash_attention_utils as flash
    from transformers.generation.continuous_batching import initialization

    calls: list[str] = []

    def counted(kernel: Any) -> Any:
        @functools.wraps(kernel)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(kernel.__name__)
            return kernel(*args, **kwargs)

        return call

    for name, kernel in {"_flash_varlen_fn": by_lengths, "_flash_with_kvcache_fn": by_table}.items():
        monkeypatch.setattr(flash, name, counted(kernel), raising=False)
    process = flash._lazy_define_process_function
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", process(by_lengths), raising=False)
    monkeypatch.setattr(flash, "_process_with_kvcache_kwargs_fn", process(by_table), raising=False)
    for name in ("_flash_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_, **__: None)
    model, texts = steer(decoder("llama-grouped"), **options), prompts()
    expected = one_by_one(model, texts)
    monkeypatch.setattr(model.get_base_model().config, "_attn_implementation_internal", "flash_attention_2")
    found = run(model, texts, max_blocks_per_request=table, return_logprobs=True)
    monkeypatch.undo()
    assert [each.generated_tokens for each in found] == expected
    assert_the_numbers_are_those_without_a_cache(model, found)
    assert set(calls) == ({"by_lengths", "by_table"} if table else {"by_lengths"})


@pytest.mark.slow
def test_compiled_steps() -> None:
    from transformers import CompileConfig

    model, texts = steer(decoder("mistral"), steer_from=1), prompts()
    expected = one_by_one(model, texts)
    compiled = CompileConfig(backend="eager", fullgraph=False, dynamic=True, mode=None)
    assert in_batch(model, texts, varlen_compile_config=compiled) == expected

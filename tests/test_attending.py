"""Calls that are steered by what the caller gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.steered import assert_same, call, inputs, steer, steered
from toast.steering import steering_of

WIDTH = 24


def embeddings(count: int, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


def own(model: nn.Module) -> nn.Parameter:
    """The task embedding of the active adapter."""
    return steering_of(model, "test")[1].task_embedding  # type: ignore[return-value]


def with_own(model: nn.Module, embedding: Tensor, x: Tensor) -> Tensor:
    """What a model computes whose adapter has the embedding."""
    twin = copy.deepcopy(model)
    own(twin).data.copy_(embedding)
    return call(twin, x)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vit", {}), ("vit", {"steer_from": 1, "select_features": "mixed", "lora_rank": 2}), ("gpt2", {})],
)
def test_it_stands_for_the_task_embedding_of_a_call(kind: str, options: dict[str, Any]) -> None:
    model, (x,) = steered(kind, **options), inputs(kind)
    before, both = call(model, x), embeddings(2)
    expected = torch.cat([with_own(model, each, x[i : i + 1]) for i, each in enumerate(both)])
    with toast.attend_to(model, both):
        found = call(model, x)
        with toast.attend_to(model, both[0].float()):  # the inner one holds, in any precision
            inner = call(model, x[:1])
    assert_same(found, expected)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(inner, found[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(call(model, x), before)


def test_of_grids_of_tokens() -> None:
    model = toast.wrap(timm.models.SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=5
    ))  # fmt: skip
    awaken(model).double().eval()
    x, both = images(2, 32), embeddings(2, 16)
    with toast.attend_to(model, both):
        found = model(x)
    assert_same(found, torch.cat([with_own(model, both[i], x[i : i + 1]) for i in range(2)]))


def test_gradients_reach_what_is_given() -> None:
    model, x, given = steered("vit").train(), images(2), embeddings(2).requires_grad_()
    with toast.attend_to(model, given):
        model(x).square().mean().backward()
    assert given.grad is not None
    assert given.grad.abs().amax(1).min() > 0
    assert own(model).grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "to_signal" in n)


def test_the_adapter_stays_as_it_is() -> None:
    """Neither the draw of a fresh embedding is settled, nor is the caller's tensor written to."""
    model, x, given = toast.wrap(vit()), images(2), embeddings(1)[0]
    drawn, kept = own(model).clone(), given.clone()
    with toast.attend_to(model, given):
        model(x)
        assert torch.equal(own(model), given)
        toast.calibrate(model, x)
    assert torch.equal(given, kept)
    assert not torch.equal(own(model), drawn)


def test_one_stored_first_pass_serves_many() -> None:
    model, x = steer(vit(), "vit", steer_from=1), images(2)
    stored = toast.first_pass(model, x)
    for given in (embeddings(2), embeddings(1)[0]):
        with toast.attend_to(model, given):
            expected = model(x)
            with toast.given_first_pass(model, stored):
                assert torch.equal(model(x), expected)
            assert torch.equal(toast.trace(model, x).output, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"steer_tokens": "prompt"}])
def test_generation(options: dict[str, Any]) -> None:
    options = dict(options)
    steer_tokens = options.pop("steer_tokens", "all")
    model = awaken(toast.wrap(decoder("llama"), steer_tokens=steer_tokens), 0.5).eval()
    x, both = tokens(2, 5), embeddings(2)
    asked = {"max_new_tokens": 5, "do_sample": False, **options}
    expected = []
    for i, each in enumerate(both):
        twin = copy.deepcopy(model)
        own(twin).data.copy_(each)
        expected.append(twin.generate(x[i : i + 1], **asked))
    with toast.attend_to(model, both):
        found = model.generate(x, **asked)
    assert torch.equal(found, torch.cat(expected))
    assert not torch.equal(found, model.generate(x, **asked))


def test_of_threads_and_generators_each_its_own() -> None:
    model, x = steered("vit"), images(2)
    given = embeddings(8)
    alone = [with_own(model, each, x) for each in given]
    before, start, found = call(model, x), threading.Barrier(len(given) + 1), {}

    def run(index: int | None) -> None:
        start.wait()
        with nullcontext() if index is None else toast.attend_to(model, given[index]):
            found[index] = [model(x) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in (None, *range(len(given)))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for index, outs in found.items():
        for out in outs:
            assert_same(out, before if index is None else alone[index])

    def outputs() -> Iterator[Tensor]:
        with toast.attend_to(model, given[0]):
            yield model(x)

    for out in outputs():
        assert_same(out, alone[0])
        assert torch.equal(model(x), before)


def test_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()
    model, x = steer(vit(depth=1), "vit").float(), images(2).float()

    def attended(x: Tensor, given: Tensor) -> Tensor:
        with toast.attend_to(model, given):
            return model(x)  # type: ignore[no-any-return]

    plain, both = model(x), embeddings(2).float()
    expected = [attended(x, given) for given in (both, both.flip(0))]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given, out in zip((both, both.flip(0)), expected, strict=True):
        with toast.attend_to(compiled, given):
            torch.testing.assert_close(compiled(x), out)
        torch.testing.assert_close(compiled(x), plain)
    assert counters["stats"]["unique_graphs"] == 2  # one serves all embeddings
    within = torch.compile(attended, fullgraph=True, backend="eager")
    torch.testing.assert_close(within(x, both), expected[0])
    torch.testing.assert_close(model(x), plain)
    torch._dynamo.reset()


def test_a_text_embedding_of_clip() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 30, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1},
        vision_config=sizes | {"image_size": 16, "patch_size": 4, "hidden_size": 16},
        projection_dim=12,
    )
    clip = CLIPModel(config).double().eval()
    text = clip.get_text_features(input_ids=torch.tensor([[1, 5, 7, 2]]))
    text = text if isinstance(text, Tensor) else text.pooler_output
    model = toast.wrap(clip.vision_model)
    direction = (text @ clip.visual_projection.weight)[0].detach()
    with toast.attend_to(model, direction):
        seen = toast.trace(model, images(2))
    expected = F.cosine_similarity(seen.features, direction, dim=-1).clamp(0, 1)
    assert_same(seen.selection_weights, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0] * WIDTH, "needs an embedding of floating-point numbers; got list"),
        (torch.ones(WIDTH, dtype=torch.long), "floating-point numbers; got torch.int64"),
        (torch.ones(WIDTH + 1), r"shape \(24,\), .* or one for each sample, \(batch, 24\); got \(25,\)"),
        (torch.ones(2, 3, WIDTH), r"got \(2, 3, 24\)"),
        (torch.ones(0, WIDTH), r"got \(0, 24\)"),
        (torch.stack([torch.ones(WIDTH), torch.zeros(WIDTH)]), "needs a direction; an embedding is zero"),
        (torch.full((WIDTH,), torch.nan), "not finite"),
    ],
)
def test_what_is_no_embedding(given: Any, message: str) -> None:
    model = toast.wrap(vit())
    with pytest.raises(ValueError, match=message):
        toast.attend_to(model, given)


def test_what_cannot_be_attended_to() -> None:
    model = steered("vit")
    with (
        toast.attend_to(model, embeddings(2)),
        pytest.raises(
            ValueError, match="given 2 task embeddings, one for each sample; the call has 4 samples"
        ),
    ):
        model(images(4))
    with pytest.raises(ValueError, match="attend_to needs a model with an active TOAST adapter"):
        toast.attend_to(vit(), embeddings(1)[0])
    language = steered("llama")
    with (
        toast.attend_to(language, embeddings(1)[0]),
        pytest.raises(ValueError, match="of its own, for which"),
    ):
        language.base_model.model.init_continuous_batching()

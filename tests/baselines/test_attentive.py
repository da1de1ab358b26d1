"""The attentive probe against its equation, on every pooling, and what looks at it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.models import VITS, WIDTH, decoder, images, vit
from toast.baselines.attentive import add_probe, find_probe, remove_probe
from toast.baselines.freezing import train_only
from toast.training.on_target import LastBlockWatcher


def awake(model: nn.Module, queries: int = 3) -> nn.Module:
    """Puts a probe in whose queries tell tokens apart."""
    probe = find_probe(add_probe(model.requires_grad_(False), queries))
    assert probe is not None
    nn.init.normal_(probe.queries)
    return model


def weights(probe: Any, tokens: Tensor) -> Tensor:
    """Attention of each query, `(batch, queries, tokens)`."""
    return (probe.queries @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5).softmax(-1)


def by_equation(probe: Any, tokens: Tensor) -> Tensor:
    values = tokens @ probe.values.weight.T + probe.values.bias
    of = values.shape[-1] // len(probe.queries)
    seen = weights(probe, tokens)
    parts = [seen[:, k, :, None] * values[..., k * of : (k + 1) * of] for k in range(len(probe.queries))]
    return torch.cat([part.sum(1) for part in parts], -1)


@pytest.mark.parametrize("kind", VITS)
def test_the_head_reads_what_the_queries_pool(kind: str) -> None:
    plain, x = vit(kind).requires_grad_(False), images(2)
    model = awake(copy.deepcopy(plain))
    expected = plain.head(by_equation(find_probe(model), plain.forward_features(x)))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_models_of_transformers_take_a_probe() -> None:
    """Dinov2's head has twice the width, for it reads class token and patches."""
    for name in ("vit", "dinov2"):
        model, inputs = zoo.build(name), zoo.example(name)
        before = model(**inputs).logits
        awake(model, 2)
        found = model(**inputs).logits
        assert found.shape == before.shape and not torch.allclose(found, before)
        assert torch.equal(remove_probe(model)(**inputs).logits, before)


def test_at_the_start_tokens_weigh_nearly_alike() -> None:
    model = add_probe(vit(), 3)
    tokens = model.forward_features(images(4))
    seen = weights(find_probe(model), tokens / tokens.std()) * tokens.shape[1]
    assert seen.min() > 0.4 and seen.max() < 2.5


def test_tokens_given_to_the_head_are_pooled_too() -> None:
    model, x = awake(vit()), images(2)
    assert torch.equal(model.head(model.forward_features(x)), model(x))


def test_threads_keep_their_tokens_apart() -> None:
    model, x = awake(vit()), images(4)
    expected = model(x)
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        for _ in range(5):
            found[i] = model(x[i : i + 1])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([found[i] for i in range(4)]), expected)


@pytest.mark.parametrize("kind", ["class-token", "average", "registers-layer-scale"])
@torch.no_grad()
def test_attention_on_target_is_the_probes_own(kind: str) -> None:
    model, x = awake(vit(kind)), images(2)
    target = torch.zeros(2, 16, 16)
    target[:, 4:12, :8] = 1  # rows 1 and 2, columns 0 and 1 of patches of 4 pixels
    watcher = LastBlockWatcher(model)
    with watcher.watching() as seen:
        model(x)
    patches = weights(find_probe(model), model.forward_features(x)).mean(1)[:, -16:].unflatten(1, (4, 4))
    expected = patches[:, 1:3, :2].sum((1, 2)) / patches.sum((1, 2))
    found = watcher.measure(seen, target)["attention_on_target"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert watcher.attention_maps(seen, (16, 16)).query == "probe"


def test_it_is_trained_with_the_head_alone() -> None:
    model = add_probe(vit(), 3)
    groups = train_only(model, "probe")
    assert groups == {
        "probe": ["probe.queries", "probe.values.weight", "probe.values.bias"],
        "head": ["head.weight", "head.bias"],
    }
    model(images(2)).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {*groups["probe"], *groups["head"]}


def test_it_comes_off_again() -> None:
    model, x = vit(), images(2)
    before = model(x)
    remove_probe(awake(model))
    assert torch.equal(model(x), before)
    assert find_probe(model) is None
    with pytest.raises(ValueError, match="has no attentive probe"):
        remove_probe(model)


def test_a_coarser_model_keeps_its_probe_in_float32() -> None:
    model = add_probe(vit().bfloat16(), 3)
    assert {p.dtype for p in model.probe.parameters()} == {torch.float32}
    assert model(images(2).bfloat16()).dtype == torch.bfloat16


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=f"queries: needs a number that divides the {WIDTH} inputs.*got 5"):
        add_probe(vit(), 5)
    with pytest.raises(ValueError, match=r"tokens are a sequence.*Llama"):
        add_probe(decoder())
    with pytest.raises(ValueError, match=r"tokens are a sequence.*SwinT"):
        add_probe(zoo.build("timm-swin"))
    with pytest.raises(ValueError, match="has a probe already"):
        add_probe(add_probe(vit(), 3), 3)
    with pytest.raises(ValueError, match=r"head: .* has none"):
        add_probe(vit(classes=0))

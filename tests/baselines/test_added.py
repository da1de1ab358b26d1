"""What methods put into a model, found and taken out again in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from toast.baselines.adaptformer import ParallelAdapter, add_adapters, remove_adapters
from toast.baselines.added import Added, find_added
from toast.baselines.attentive import AttentivePool, add_probe, remove_probe
from toast.baselines.vpt import Prompts, add_prompts, remove_prompts

METHODS: list[tuple[type[Added], Callable[[nn.Module], Any], Callable[[nn.Module], Any], str]] = [
    (Prompts, lambda model: add_prompts(model, 3, deep=True), remove_prompts, "no prompts; add_prompts"),
    (AttentivePool, lambda model: add_probe(model, 4), remove_probe, "no attentive probe; add_probe"),
    (ParallelAdapter, add_adapters, remove_adapters, "no adapters; add_adapters"),
]


@pytest.mark.parametrize(("kind", "add", "remove", "missing"), METHODS)
def test_what_was_put_in_is_found_and_taken_out(
    kind: type[Added], add: Callable[[nn.Module], Any], remove: Callable[[nn.Module], Any], missing: str
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    plain, names = model(images), list(model.state_dict())
    with pytest.raises(ValueError, match=f"VisionTransformer has {missing}"):
        remove(model)
    add(model)
    added = find_added(model, kind)
    assert added and all(module.handles for module in added)
    for parameter in added[0].parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(images), plain)
    assert remove(model) is model
    assert find_added(model, kind) == [] and list(model.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(images), plain)

"""Heads are found in both libraries and can be made anew."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests import zoo
from tests.models import WIDTH, decoder, images, vit
from toast.baselines.heads import head_of, heads_of, reset_head

HEADS = {
    "timm-vit": ["head"],
    "timm-swin": ["head.fc"],
    "timm-deit-distilled": ["head", "head_dist"],
    "vit": ["classifier"],
    "llama": ["lm_head"],
    "gpt-neox": ["lm_head"],
    "bert": ["classifier"],
    "bert-decoder": ["cls.predictions.decoder"],
    "llava": ["lm_head"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found(name: str) -> None:
    model = zoo.build(name)
    found = heads_of(model)
    assert list(found) == HEADS[name]
    assert all(model.get_submodule(path) is module for path, module in found.items())


def test_heads_can_be_named() -> None:
    model = vit("average-fc-norm")
    assert list(heads_of(model, ("fc_norm", "head"))) == ["fc_norm", "head"]
    assert head_of(model) == ("head", model.head)
    assert heads_of(model, ()) == {}
    with pytest.raises(ValueError, match=r"head: needs paths .* whose children are patch_embed, .*; got clf"):
        heads_of(model, "clf")


def test_no_head_and_several_are_told() -> None:
    with pytest.raises(ValueError, match=r"head: VisionTransformer has none.*reset_head"):
        head_of(vit(classes=0))
    with pytest.raises(ValueError, match="has several, head, head_dist"):
        head_of(zoo.build("timm-deit-distilled"))


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "timm-deit-distilled", "vit", "dinov2", "roberta"])
@pytest.mark.parametrize("zero", [False, True])
def test_new_heads_have_the_classes(name: str, zero: bool) -> None:
    model = zoo.build(name)
    heads = reset_head(model, 7, zero=zero)
    assert list(heads) == list(heads_of(model))
    out = model(**zoo.example(name))
    logits = out if isinstance(out, torch.Tensor) else out.logits
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float64
    assert (logits.count_nonzero() == 0) == zero


def test_transformers_configuration_follows() -> None:
    model = zoo.build("vit")
    reset_head(model, 7)
    assert model.config.num_labels == len(model.config.id2label) == 7
    labels = torch.tensor([6, 0])
    assert model(**zoo.example("vit"), labels=labels).loss.isfinite()


def test_headless_timm_models_get_one() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).bfloat16()
    ((path, head),) = reset_head(model, 3).items()
    assert path == "head"
    assert isinstance(head, nn.Linear)
    assert head.weight.dtype == torch.bfloat16


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="classes: needs at least 1; got 0"):
        reset_head(vit(), 0)
    with pytest.raises(ValueError, match="is the vocabulary and cannot be reset to 4 classes"):
        reset_head(decoder(), 4)
    assert vit()(images(1)).shape == (1, 5)
    assert vit().head.in_features == WIDTH

"""Calibration points a task embedding by samples, or says why these give none; what cannot be wrapped."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.models import WIDTH, decoder, images, tokens, vit
from tests.snapshots import refused
from toast.calibrating import stands_out
from toast.steering import find_steering

NAN = float("nan")


def task_embedding(model: nn.Module) -> Tensor:
    return find_steering(model).selector.toast_task_embedding["default"].detach().clone()


def by_hand(patches: Tensor) -> Tensor:
    """What stands out, computed patch by patch."""
    mean = patches.mean((0, 1))
    found = torch.zeros_like(mean)
    for picture in patches:
        for patch in picture:
            differs = patch - picture.mean(0)
            found += differs.norm() * differs
    return F.normalize(found - (found @ mean) / (mean @ mean) * mean, dim=0)


@pytest.mark.parametrize(
    ("kind", "prefix"), [("class-token", 1), ("registers-layer-scale", 3), ("average", 0)]
)
def test_in_pictures_it_points_to_what_stands_out(kind: str, prefix: int) -> None:
    model = toast.wrap(vit(kind))
    toast.calibrate(model, x := images())
    features = toast.trace(model, x).features
    torch.testing.assert_close(task_embedding(model), by_hand(features[:, prefix:]))
    assert (toast.trace(model, x).selection_weights[:, prefix:].amax(1) > 0).all()


def test_it_reads_what_is_compared() -> None:
    bare, x = vit(), images()
    found = []
    for features in ("normed", "mixed"):  # mixed: normed features are compared, others selected
        model = toast.wrap(copy.deepcopy(bare), select_features=features)
        toast.calibrate(model, x)
        found.append(task_embedding(model))
    torch.testing.assert_close(found[0], found[1])


def test_the_object_of_a_picture_is_selected_not_the_ground() -> None:
    generator = torch.Generator().manual_seed(0)
    ground, thing = torch.randn(2, WIDTH, generator=generator)
    patches = ground + 0.1 * torch.randn(6, 16, WIDTH, generator=generator)
    patches[:, :3] += thing + 0.3 * torch.randn(6, 3, WIDTH, generator=generator)
    weights = F.cosine_similarity(patches, stands_out(patches), dim=-1).clamp(0, 1)
    assert weights[:, :3].mean() > 8 * weights[:, 3:].mean()


def test_pictures_of_one_colour_give_their_mean() -> None:
    patches = torch.ones(2, 16, WIDTH) * torch.arange(WIDTH)
    torch.testing.assert_close(F.normalize(stands_out(patches), dim=0), F.normalize(patches[0, 0], dim=0))


def test_in_text_it_points_to_the_mean_without_padding() -> None:
    found, bare = [], decoder("llama", torch.float32)
    for padding in (0, 5):
        model = toast.wrap(copy.deepcopy(bare))
        text, mask = tokens(2), torch.ones(2, 9, dtype=torch.long)
        text[:] = torch.arange(1, 10)
        text[0, :3], mask[0, :3] = padding, 0
        toast.calibrate(model, input_ids=text, attention_mask=mask)
        read = toast.trace(model, input_ids=text, attention_mask=mask, use_cache=False).features[mask.bool()]
        expected = F.normalize(F.normalize(read, dim=-1).mean(0), dim=0)
        torch.testing.assert_close(task_embedding(model), expected)
        found.append(expected)
    torch.testing.assert_close(found[0], found[1])


def test_it_needs_an_active_adapter() -> None:
    with pytest.raises(ValueError, match="calibrate needs a model with an active TOAST adapter"):
        toast.calibrate(vit(), images())


@pytest.mark.parametrize(
    ("make", "samples", "options", "message"),
    [
        (vit, lambda: images(0), {}, r"empty batch of shape \(0, 3, 16, 16\)"),
        (decoder, lambda: tokens(0), {}, r"empty batch of shape \(0, 9\)"),
        (decoder, lambda: tokens(2, 0), {}, r"empty batch of shape \(2, 0\)"),
        (vit, lambda: images() * NAN, {}, "features that are not finite"),
        (vit, lambda: torch.cat([images(2), images(1) * NAN]), {}, "features that are not finite"),
        (decoder, tokens, {"attention_mask": torch.zeros(3, 9).long()}, "no token but padding"),
    ],
)
def test_samples_without_features_are_refused(make, samples, options: Any, message: str) -> None:
    model = toast.wrap(make())
    with refused(model, f"calibrate needs samples.*{message}"):
        toast.calibrate(model, samples(), **options)


@pytest.mark.parametrize("model", [None, vit, "vit_tiny_patch16_224"])
def test_what_is_no_module_is_not_wrapped(model: Any) -> None:
    with pytest.raises(TypeError, match="model: needs a torch module to wrap; got"):
        toast.wrap(model)


@pytest.mark.parametrize("config", [{}, {"lora_rank": 4}, peft.LoraConfig(), "vision"])
def test_another_configuration_is_not_taken(config: Any) -> None:
    with refused(model := vit(), "config: needs a ToastConfig, .*; got (dict|LoraConfig|str)", TypeError):
        toast.wrap(model, config)

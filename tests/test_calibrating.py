"""Calibration writes a task embedding from samples, or says why these give none; what cannot be wrapped."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import toast
from tests.models import decoder, images, tokens, vit
from tests.snapshots import refused

NAN = float("nan")


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

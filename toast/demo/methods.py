"""The methods that the demonstration sets side by side, on one backbone and one task."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import toast
from toast.demo.backbone import load_backbone
from toast.demo.measures import batches
from toast.demo.task import CLASSES, Pictures, load_materials, normalise
from toast.demo.training import Recipe, fit

#: Rates were chosen with `scripts/tune_demo.py`, on pictures of the training split that were held out for it.
RECIPES = {
    "pre-tuning": Recipe(learning_rate=1e-3, epochs=2, head_rate=3e-3),
    "linear": Recipe(learning_rate=1e-2, epochs=20),
    "lora": Recipe(learning_rate=3e-3, epochs=3, head_rate=3e-3),
    "toast": Recipe(learning_rate=1e-3, epochs=3, head_rate=3e-3),
    "toast-lite": Recipe(learning_rate=3e-3, epochs=3, head_rate=3e-3),
}
LORA_RANK = 8
LITE_RANK = 4
#: Block that the selector reads. The last one tells objects from ground more than from each other: the
#: backbone that it was distilled from was tuned for that.
SELECT_FROM = 9


@dataclass(frozen=True)
class Trained:
    """A trained model, how many parameters were trained, and the seconds that it took."""

    model: nn.Module
    trainable: int
    seconds: float


def trainable_parameters(model: nn.Module) -> int:
    """Counts the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def pre_tune(
    generic: Pictures,
    folder: Path,
    recipe: Recipe = RECIPES["pre-tuning"],
    seed: int = 0,
    select_from: int = SELECT_FROM,
) -> float:
    """Stage one: trains the top-down module on generic pictures and saves it.

    The loss is the reconstruction loss, plus cross-entropy of both passes on the folder that the main picture
    comes from. The head for the folders is thrown away with the stage.

    Args:
        generic: Pictures of clip-art.
        folder: Where the adapter goes, in PEFT's format.
        recipe: How to train.
        seed: Of the order of the data.
        select_from: Block that the selector reads, in the second stage too.

    Returns:
        Seconds that it took.
    """
    backbone = load_backbone(len(load_materials().folders))
    model = toast.wrap(backbone, select_from=select_from, modules_to_save=["head"])
    toast.calibrate(model, normalise(generic.images[:64]))

    def loss(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return toast.pretraining_loss(
            module, images, task_loss=lambda output: nn.functional.cross_entropy(output, labels)
        )[0]

    seconds = fit(model, generic.images, generic.labels, recipe, "pre-tuning", loss, normalise, seed)
    toast.save_adapter(model, folder)
    return seconds


def linear(train: Pictures, pretrained: Path, recipe: Recipe, seed: int = 0) -> Trained:
    """Trains the head alone, on the frozen features: computed once, so that more epochs cost nothing."""
    model = load_backbone(len(CLASSES)).requires_grad_(False)
    model.head.requires_grad_(True)
    start = time.perf_counter()
    with torch.inference_mode():
        features = torch.cat(
            [
                model.forward_head(model.forward_features(images), pre_logits=True)
                for images, _, _ in batches(train)
            ]
        ).clone()
    fit(model.head, features, train.labels, recipe, "linear probe", seed=seed)
    return Trained(model, trainable_parameters(model), time.perf_counter() - start)


def lora(train: Pictures, pretrained: Path, recipe: Recipe, seed: int = 0) -> Trained:
    """Trains PEFT's LoRA on queries, keys and values, and the head."""
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["qkv"], modules_to_save=["head"])
    model = get_peft_model(load_backbone(len(CLASSES)), config)
    return _tune(model, train, recipe, f"LoRA, rank {LORA_RANK}", seed)


def full_toast(train: Pictures, pretrained: Path, recipe: Recipe, seed: int = 0) -> Trained:
    """Stage two: trains the whole pre-tuned top-down module and the head."""
    model = toast.wrap(
        load_backbone(len(CLASSES)),
        pretrained=str(pretrained),
        modules_to_save=["head"],
    )
    return _tune(model, train, recipe, "TOAST", seed)


def toast_lite(train: Pictures, pretrained: Path, recipe: Recipe, seed: int = 0) -> Trained:
    """Stage two with the pre-tuned feedback frozen: trains LoRA factors on it, the selector and the head."""
    model = toast.wrap(
        load_backbone(len(CLASSES)),
        pretrained=str(pretrained),
        lora_rank=LITE_RANK,
        lora_alpha=LITE_RANK,
        modules_to_save=["head"],
    )
    return _tune(model, train, recipe, f"TOAST-Lite, rank {LITE_RANK}", seed)


def _tune(model: nn.Module, train: Pictures, recipe: Recipe, name: str, seed: int) -> Trained:
    seconds = fit(model, train.images, train.labels, recipe, name, prepare=normalise, seed=seed)
    return Trained(model, trainable_parameters(model), seconds)


METHODS: dict[str, Callable[[Pictures, Path, Recipe, int], Trained]] = {
    "linear": linear,
    "lora": lora,
    "toast": full_toast,
    "toast-lite": toast_lite,
}


def shortened(recipe: Recipe, share: float) -> Recipe:
    """Returns a recipe with a share of the epochs, at least one."""
    return replace(recipe, epochs=max(1, round(recipe.epochs * share)))

"""The demonstration's training loop, one for all methods, through Accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How something is trained: AdamW, one cycle (warm-up over a tenth of the steps, then cosine).

    The head of a network needs a rate of its own: it starts at zero, what is pre-trained does not.

    Args:
        learning_rate: Peak of the cycle.
        head_rate: Peak for the head; None is the same.
        epochs: Passes over the data.
        batch: Pictures a step.
        weight_decay: Of AdamW.
    """

    learning_rate: float
    epochs: int
    head_rate: float | None = None
    batch: int = 32
    weight_decay: float = 0.01


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the task's loss."""
    return nn.functional.cross_entropy(model(inputs), labels)


def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    name: str,
    loss: Loss = cross_entropy,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    seed: int = 0,
) -> float:
    """Trains what requires a gradient, and shows progress.

    Args:
        model: The model.
        inputs: `(n, ...)`, what `prepare` makes the model's input of.
        labels: `(n,)`.
        recipe: How to train.
        name: Shown before the progress bar.
        loss: Maps model, inputs and labels of a batch to the loss.
        prepare: Applied to the inputs of each batch.
        seed: Of the order of the data.

    Returns:
        Seconds that it took.
    """
    set_seed(seed)
    accelerator = Accelerator()
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=recipe.batch, shuffle=True, drop_last=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [name for name in trained if "head" in name.split(".")]
    rates = [recipe.learning_rate, recipe.head_rate or recipe.learning_rate]
    groups = [
        {"params": [trained[n] for n in trained if n not in head]},
        {"params": [trained[n] for n in head]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * len(loader)
    warm_up = 0.1 if steps != 10 else 0.2  # OneCycleLR divides by zero if it is exactly one step
    cycle = OneCycleLR(optimizer, rates, total_steps=steps, pct_start=warm_up)
    model, optimizer, loader, cycle = accelerator.prepare(model, optimizer, loader, cycle)
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"{name:<24}", unit="step", ncols=100) as bar:
        for _ in range(recipe.epochs):
            for batch, wanted in loader:
                value = loss(model, prepare(batch), wanted)
                accelerator.backward(value)
                accelerator.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                cycle.step()
                optimizer.zero_grad()
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix_str(f"loss {value.item():.3f}")
    model.eval()
    return time.perf_counter() - start

"""Losses that are no finite numbers: found before they do harm where that is free, and named with samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from toast.files.tensors import is_finite
from toast.training.order import Key

#: Samples that a message names.
_NAMED = 8


class Diverged(ValueError):
    """A run met a loss, gradients or weights that are not finite, and stopped.

    Args:
        step: The step, counted from 1.
        total: Steps of the run.
        what: What was met.
        samples: Names of the step's samples.
        before: A checkpoint from before; None if there is none.
    """

    def __init__(self, step: int, total: int, what: str, samples: Sequence[str], before: Path | None) -> None:
        super().__init__(
            f"step {step} of {total}: {what}. Its samples: {listed(samples)}. "
            f"{'There is no checkpoint yet' if before is None else f'{before} is from before'}. Begin "
            "another run with a lower optimizer.learning_rate, fix the samples, or continue with --resume "
            "on_nonfinite=skip, which skips such steps."
        )
        self.step = step


def over_processes(accelerator: Accelerator, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the mean of each number over the processes, in one exchange and without waiting for the device.

    Args:
        accelerator: Knows the processes.
        parts: Tensors `()` by name, the same names in every process.
    """
    held = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in parts.values()]
    means = accelerator.reduce(torch.stack([value.float() for value in held]), "mean")
    return dict(zip(parts, means.unbind(), strict=True))


def read(parts: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Returns the numbers of a step; waits for the device once."""
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    numbers = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
    return {name: numbers.get(name, value) for name, value in parts.items()}


def not_finite(numbers: Mapping[str, float], scaled: bool) -> list[str]:
    """Returns the names of the numbers of a step that are not finite, as they are called in messages.

    Args:
        numbers: Losses and norm of the gradient by name.
        scaled: Whether a loss scaler looks for its scale, which gives infinite gradients now and then; it
            leaves these steps out by itself.
    """
    looked_at = {n: v for n, v in numbers.items() if not (scaled and n == "gradient_norm")}
    return [f"{n.replace('_', ' ')} ({v})" for n, v in looked_at.items() if not math.isfinite(v)]


def as_words(bad: Sequence[str]) -> str:
    """Returns what `not_finite` found as the part of a message."""
    return f"the {' and the '.join(bad)} of the step is not finite"


def all_finite(accelerator: Accelerator, tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are finite in every process."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    bad = torch.tensor(float(not all(map(is_finite, local))), device=accelerator.device)
    return not float(accelerator.reduce(bad, "sum"))


def named_samples(data: Any, keys: Sequence[Key]) -> list[str]:
    """Names the samples of a step: those that hold numbers that are not finite, else all.

    Args:
        data: The training samples.
        keys: Of the step's samples.
    """
    names, culprits = [], []
    for key in keys:
        name = sample_name(data, key[1])
        names.append(name)
        tensors = [value for value in data[key].values() if isinstance(value, Tensor)]
        if not all(map(is_finite, tensors)):
            culprits.append(f"{name} (holds numbers that are not finite)")
    return culprits or names


def listed(names: Sequence[str]) -> str:
    """Returns names for a message, the first of them if there are many."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def sample_name(data: Any, index: int) -> str:
    """Returns what a sample of a split is called: a picture's name, or the number of a row of text."""
    name_of = getattr(getattr(data, "source", None), "sample_name", "row {}".format)
    return str(name_of(index))

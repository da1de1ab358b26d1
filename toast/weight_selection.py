"""Weight Selection: a model starts from a part of the weights of a larger one of its family.

"Initializing Models with Larger Ones", Xu, Chen, Vishniakov, Yin, Shen, Darrell, Liu, Liu, arXiv 2311.18823.

The paper takes elements evenly along every axis of every tensor. Here the axes have names, so that the same
channels are taken wherever the residual stream runs, and heads of one size are taken whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from toast.families.anatomy import Anatomy, find_anatomy
from toast.families.tensor_axes import (
    TensorAxes,
    channel_counts,
    factors,
    find_tensor_axes,
    named_tensors,
)

Elements = Literal["uniform", "consecutive", "random"]
Layers = Literal["first", "uniform"]
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def select_weights(
    student: Model,
    teacher: nn.Module,
    elements: Elements = "uniform",
    layers: Layers = "first",
    seed: int = 0,
) -> Model:
    """Gives a model the weights of a larger one of its family, as many as it has room for.

    The models may be timm's ViT, DeiT and ConvNeXt, and transformers' ViT, DeiT, Llama, Mistral, Qwen 2 and 3
    and GPT-2. Tensors are matched by name. A classifier of another number of classes stays as it is.

    Attention heads are taken whole if those of both models have one size; else channels of each are selected.
    Rotary embeddings turn pairs of channels, which stay pairs; if heads differ in size, only `uniform` takes
    those whose frequencies are the student's.

    Args:
        student: The smaller model; its parameters are written to.
        teacher: The larger one.
        elements: Which channels: evenly spaced, the first, or drawn.
        layers: Which layers, of each stage if there are several: the first, or evenly spaced.
        seed: Of what is drawn.

    Returns:
        The student.

    Raises:
        ValueError: If a setting is unknown or a tensor does not fit. The student is as it was.

    Example:
        >>> import timm, toast
        >>> teacher = timm.create_model("vit_small_patch16_224")
        >>> student = toast.select_weights(timm.create_model("vit_tiny_patch16_224"), teacher)
        >>> bool((student.cls_token == teacher.cls_token[..., ::2]).all())
        True
    """
    for what, given, known in (("elements", elements, Elements), ("layers", layers, Layers)):
        if given not in get_args(known):
            raise ValueError(f"{what}: needs one of {', '.join(get_args(known))}; got {given!r}.")
    small, large = find_anatomy(student), find_anatomy(teacher)
    row = find_tensor_axes(small.family.name)
    if large.family.name not in row.families:
        raise ValueError(
            f"the student is a model of {small.family.name}, the teacher one of {large.family.name}; weights "
            "are selected within a family."
        )
    few, many = _Side("student", student, small, row), _Side("teacher", teacher, large, row)
    for parameter, weights in _Selection(few, many, elements, layers, seed).tensors():
        parameter.copy_(weights)
    return student


class _Side:
    """One of the two models: its tensors, its channels by name, and how many layers its lists have."""

    def __init__(self, role: str, model: nn.Module, anatomy: Anatomy, row: TensorAxes) -> None:
        try:
            self.tensors = named_tensors(model, row)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None
        self.role = role
        self.counts = channel_counts(anatomy, row, self.tensors)
        self.layer = re.compile(rf"(.*(?:^|\.){row.layers}\.)(\d+)(\..*)")
        self.depths: dict[str, int] = {}
        for name in self.tensors:
            if match := self.layer.fullmatch(name):
                self.depths[match[1]] = max(self.depths.get(match[1], 0), int(match[2]) + 1)

    def factors(self, name: str) -> list[list[int]]:
        """Returns how each axis of a tensor divides among its names."""
        each = self.tensors[name]
        what = f"the {self.role}'s {name}"
        return [
            factors(what, axis, size, self.counts)
            for axis, size in zip(each.axes, each.tensor.shape, strict=True)
        ]


class _Selection:
    """What of the teacher goes into each tensor of the student."""

    def __init__(self, student: _Side, teacher: _Side, elements: Elements, layers: Layers, seed: int) -> None:
        self.student, self.teacher, self.layers = student, teacher, layers
        draw = torch.Generator().manual_seed(seed)
        self.channels = {}
        for name in sorted(student.counts.keys() & teacher.counts.keys()):
            few, many = student.counts[name], teacher.counts[name]
            if few <= many:
                self.channels[name] = chosen(many, few, elements, draw)

    def tensors(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns each tensor of the student with the weights that go into it."""
        for name, each in self.teacher.tensors.items():
            if name not in self.student.tensors and not each.answers and not self._is_above(name):
                raise ValueError(
                    f"{name} is a tensor of the teacher that the student does not have, so it would compute "
                    "another function. Create the two with the same options."
                )
        pairs = []
        for name, each in self.student.tensors.items():
            source = self._source(name)
            if source not in self.teacher.tensors:
                if not each.answers:
                    raise ValueError(
                        f"{name} has no counterpart in the teacher, which has no {source}. Create the two "
                        "with the same options."
                    )
            elif not each.answers or len(each.tensor) == len(self.teacher.tensors[source].tensor):
                pairs.append((each.tensor, self._selected(name, source)))
        return pairs

    def _is_above(self, name: str) -> bool:
        """Whether a tensor is of a layer of a higher number than the student has."""
        match = self.student.layer.fullmatch(name)
        return match is not None and int(match[2]) >= self.student.depths.get(match[1], 0)

    def _source(self, name: str) -> str:
        """Returns the name that a tensor of the student has in the teacher."""
        match = self.student.layer.fullmatch(name)
        if match is None:
            return name
        few, many = self.student.depths[match[1]], self.teacher.depths.get(match[1], 0)
        if few > many:
            raise ValueError(
                f"{name} does not fit: the student has {few} layers in {match[1].rstrip('.')!r}, the teacher "
                f"{many}; it needs at least as many."
            )
        index = int(match[2])
        if self.layers == "uniform":
            index = int(evenly(many, few)[index])
        return f"{match[1]}{index}{match[3]}"

    def _selected(self, name: str, source: str) -> Tensor:
        """Returns what of a tensor of the teacher goes into one of the student."""
        mine, other = self.student.tensors[name], self.teacher.tensors[source]
        if mine.axes != other.axes:
            raise ValueError(
                f"{name} has shape {tuple(mine.tensor.shape)}, the teacher's {source} "
                f"{tuple(other.tensor.shape)}, of another number of axes."
            )
        weights = other.tensor.detach()
        sizes = zip(mine.axes, self.student.factors(name), self.teacher.factors(source), strict=True)
        for dimension, (axis, few, many) in enumerate(sizes):
            kept = []
            for part, less, more in zip(axis, few, many, strict=True):
                if less > more or (less != more and part == "_"):
                    needs = "the same number" if part == "_" else "at least as many"
                    what = f"along axis {dimension}" if part == "_" else f"channels of {part!r}"
                    advice = _ADVICE if part == "_" else ""
                    raise ValueError(
                        f"{name} does not fit: the student has {less} {what}, the teacher's {source} "
                        f"{more}; it needs {needs}.{advice}"
                    )
                kept.append((more, torch.arange(more) if part == "_" else self.channels[part]))
            weights = weights.index_select(dimension, positions(kept).to(weights.device))
        return weights


_ADVICE = (
    " Positions, vocabularies and kernels are not selected: create the two for the same inputs "
    "(pictures: timm.layers.resample_abs_pos_embed)."
)


def chosen(many: int, few: int, elements: Elements, draw: torch.Generator) -> Tensor:
    """Returns which of `many` channels are taken, in their order, `(few,)`."""
    if elements == "consecutive" or few == many:
        return torch.arange(few)
    if elements == "random":
        return torch.randperm(many, generator=draw)[:few].sort().values
    return evenly(many, few)


def evenly(many: int, few: int) -> Tensor:
    """Returns `few` numbers below `many`, evenly spaced: every k-th if `few` divides it, else end to end."""
    if many % few == 0:
        return torch.arange(few) * (many // few)
    return torch.linspace(0, many - 1, few, dtype=torch.float64).round().long()


def positions(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Returns where on an axis the channels lie that are chosen of each of its parts.

    Args:
        parts: By part, the outermost first, how many channels it has and which of them are chosen.

    Example:
        >>> positions([(3, torch.tensor([0, 2])), (10, torch.tensor([4, 7]))])
        tensor([ 4,  7, 24, 27])
    """
    at = torch.zeros(1, dtype=torch.long)
    for count, index in parts:
        at = (at[:, None] * count + index).flatten()
    return at

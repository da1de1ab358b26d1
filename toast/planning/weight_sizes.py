"""What the weights of a model need, as they are and as bitsandbytes would quantise the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from toast.families.layouts import is_transposed
from toast.saving.names import is_of_adapter

#: Of 4-bit weights (NF4): a float32 scale for so many of them (bitsandbytes' default, scales not quantised).
_BLOCK = 64


@dataclass(frozen=True)
class Place:
    """Where a parameter of the base stands.

    Args:
        parameter: The parameter.
        block: Its block; None outside of all.
        linear: Whether it is the weight of a linear map in a block, which is what is quantised.
    """

    parameter: nn.Parameter
    block: int | None
    linear: bool


@dataclass(frozen=True)
class Weights:
    """What a model holds, in bytes.

    Args:
        blocks: The frozen base, by block.
        rest: The frozen base outside of its blocks, and buffers.
        maps: Frozen parts of the adapter: the maps of TOAST-Lite.
        map_unit: The largest parameter of the adapter.
        trained: What is trained, float32.
        trained_blocks: What of it belongs to the base's blocks, such as by full tuning, by block.
        low: Bytes of an element in the precision that is computed in.
        gathers: How often a process needs all of each block in a micro-batch.
        dequantised: What the largest quantised weight needs while it is used.
    """

    blocks: tuple[float, ...]
    rest: float
    maps: float
    map_unit: float
    trained: float
    trained_blocks: tuple[float, ...]
    low: int
    gathers: tuple[int, ...]
    dequantised: float = 0.0

    @property
    def frozen(self) -> float:
        """All that is frozen."""
        return sum(self.blocks) + self.rest + self.maps

    @property
    def unit(self) -> float:
        """The largest unit: a block in the precision that is computed in, or a map of the feedback."""
        trained = [size * self.low / 4 for size in self.trained_blocks]
        sizes = [frozen + own for frozen, own in zip(self.blocks, trained, strict=True)]
        return max((*sizes, self.map_unit))


def places_of(model: nn.Module, blocks: list[str]) -> Iterator[Place]:
    """Yields every parameter of a base with its place; those that are tied once.

    Args:
        model: The base, before a method is applied.
        blocks: Paths of its blocks.
    """
    starts = {f"{name}.": index for index, name in enumerate(blocks)}
    seen: set[int] = set()
    for path, module in model.named_modules():
        block = next((starts[start] for start in starts if f"{path}.".startswith(start)), None)
        linear = block is not None and (isinstance(module, nn.Linear) or is_transposed(module))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield Place(parameter, block, linear and name == "weight")


def weigh(
    model: nn.Module,
    places: Mapping[str, Place],
    gathers: tuple[int, ...],
    low: int,
    bits: int | None = None,
) -> Weights:
    """Returns what the weights of a model need.

    Args:
        model: The model with its method, what is trained marked.
        places: The places of the base's parameters, by their names in it.
        gathers: See `Weights`; one for each block.
        low: Bytes of an element in the precision that is computed in.
        bits: 8 or 4 if the frozen linear maps in the blocks are quantised.
    """
    blocks, trained_blocks = [0.0] * len(gathers), [0.0] * len(gathers)
    rest = float(sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()))
    maps = map_unit = trained = dequantised = 0.0
    for name, parameter in model.named_parameters():
        place, size = places.get(name), float(parameter.numel() * parameter.element_size())
        if place is None and is_of_adapter(name):
            map_unit = max(map_unit, size)
        if parameter.requires_grad:
            trained += size
            if place is not None and place.block is not None:
                trained_blocks[place.block] += size
        elif place is not None and place.block is not None:
            if place.linear and bits is not None:
                dequantised = max(dequantised, parameter.numel() * low)
                size = quantised(parameter, bits)
            blocks[place.block] += size
        elif place is None and is_of_adapter(name):
            maps += size
        else:
            rest += size
    return Weights(
        tuple(blocks), rest, maps, map_unit, trained, tuple(trained_blocks), low, gathers, dequantised
    )


def quantised(weight: nn.Parameter, bits: int) -> float:
    """Returns the bytes of a quantised weight with its scales: one a row of 8-bit, one a block of 4-bit."""
    scales = weight.shape[0] if bits == 8 else weight.numel() / _BLOCK
    return weight.numel() * bits / 8 + 4 * scales

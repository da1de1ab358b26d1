"""A batch whose samples name different adapters: both passes run once, for all samples together.

Features of the frozen model do not depend on the adapter, and a signal belongs to its sample. So only
selection, feedback and heads are done adapter by adapter, each on its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from toast.adapter import Adapter
from toast.feedback import feed_back
from toast.selector import ToastSelector
from toast.signals import FusedSignal, Signal
from toast.stored_pass import settings_of

#: PEFT's name for the frozen model in a list of adapters.
BASE = "__base__"


@dataclass(frozen=True)
class MixedAdapter(Adapter):
    """The adapters of one batch. Whatever is the same for all of them is that of the first.

    Args:
        parts: Each adapter, None for the frozen model, with the numbers of its samples.
        repeated: Whether calls may hold every sample several times, as beam search has it.
    """

    parts: tuple[tuple[Adapter | None, tuple[int, ...]], ...] = ()
    repeated: bool = False

    def rows(self, batch: int) -> list[list[int]]:
        """Returns the rows of each part in a batch.

        Args:
            batch: Rows of the batch.

        Raises:
            ValueError: If there are not as many names.
        """
        samples = sum(len(numbers) for _, numbers in self.parts)
        times, rest = divmod(batch, samples)
        if rest or times < 1 or (times > 1 and not self.repeated):
            raise ValueError(f"adapter_names: needs a name for each sample; got {samples} for {batch} rows.")
        return [[times * i + j for i in numbers for j in range(times)] for _, numbers in self.parts]

    def generating(self, inputs: Iterable[Any]) -> MixedAdapter:
        """Returns the same for the calls of `generate`.

        Args:
            inputs: What `generate` was given, the prompts or their embeddings among it.

        Raises:
            ValueError: If there are not as many names as prompts.
        """
        self.rows(next(len(x) for x in inputs if isinstance(x, Tensor)))
        return replace(self, repeated=True)

    def refuse_training_fused(self) -> None:
        """As `Adapter.refuse_training_fused`, of each."""
        for adapter, _ in self.parts:
            if adapter is not None:
                adapter.refuse_training_fused()

    def signals(
        self, selector: ToastSelector, unnormed: Tensor | None, normed: Tensor | None
    ) -> dict[int, Signal]:
        """Selects and feeds back, each adapter on its rows.

        Args:
            selector: The selector.
            unnormed: Features before the final norm, `(batch, tokens, width)`; None if they are not read.
            normed: Features after it.
        """
        features = normed if unnormed is None else unnormed
        assert features is not None
        rows = self.rows(len(features))
        made = []
        for (adapter, _), own in zip(self.parts, rows, strict=True):
            if adapter is None:
                continue
            read = [None if each is None else each[own] for each in (unnormed, normed)]
            selector.start_from(adapter, *read)
            made.append((adapter, own, feed_back(adapter, selector.select(adapter, *read))))
        return {number: _merged(number, made, len(features)) for number in made[0][2]}


def _merged(number: int, made: Sequence[tuple[Adapter, list[int], dict[int, Signal]]], batch: int) -> Signal:
    """Returns the signal of one unit for all rows; rows of the frozen model get none."""
    parts = [(rows, signals[number]) for _, rows, signals in made]
    if all(isinstance(signal, Tensor) for _, signal in parts):
        return _placed([(rows, signal) for rows, signal in parts if isinstance(signal, Tensor)], batch)
    maps = next(each for each in made[0][0].maps if each.unit.number == number)
    weight = maps.value_weight
    assert weight is not None  # otherwise no signal is a shift
    shifts = [
        (rows, F.linear(s.to(weight), weight) if isinstance(s, Tensor) else s.value_shift(weight.dtype))
        for rows, s in parts
    ]
    return FusedSignal(_placed(shifts, batch))


def _placed(parts: Sequence[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """Returns a tensor of all rows, zero where no part has one."""
    dtype = parts[0][1].dtype
    whole = parts[0][1].new_zeros(batch, *parts[0][1].shape[1:])
    for rows, part in parts:
        whole[rows] = part.to(dtype)
    return whole


@dataclass(frozen=True)
class MixedHead:
    """Runs each adapter's copy of a module on its rows.

    Args:
        adapter: The adapters.
        modules: What runs the rows of each of its parts.
    """

    adapter: MixedAdapter
    modules: Sequence[Callable[..., Any]]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs them; the first argument and the result have the batch as first dimension."""
        rows = self.adapter.rows(len(x))
        parts = [
            (own, module(x[own], *args, **kwargs)) for own, module in zip(rows, self.modules, strict=True)
        ]
        return _placed(parts, len(x))


def mixed(names: Sequence[str], known: dict[str, Adapter]) -> Adapter | None:
    """Returns the adapters of a batch as one, which names all; None if all samples are the frozen model's.

    Args:
        names: The adapter of each sample; `__base__` for the frozen model.
        known: The adapters that are named, by name.

    Raises:
        ValueError: If they read or steer other blocks, or differ in what holds for a whole pass.
    """
    if not known:
        return None
    check_alike(list(known.values()), "adapter_names", apart=("value_bias", "steer_tokens"))
    first = next(iter(known.values()))
    if BASE in names and first.config.value_bias == "twice":
        raise ValueError(
            f"adapter_names: {BASE!r} cannot be beside adapters with value_bias='twice', which changes every "
            "sample of a pass. Call the model for it with model.disable_adapter()."
        )
    parts = tuple(
        (known.get(name), tuple(i for i, each in enumerate(names) if each == name))
        for name in dict.fromkeys(names)
    )
    name = ", ".join(names)  # what a key-value cache is known by
    return MixedAdapter(
        name, first.config, first.task_embedding, first.channel_transform, first.maps, parts=parts
    )


def check_alike(adapters: Sequence[Adapter], what: str, apart: Sequence[str] = ()) -> None:
    """Checks that one first pass serves several adapters.

    Args:
        adapters: The adapters.
        what: What needs it, for the message.
        apart: Further settings that have to agree.

    Raises:
        ValueError: If it does not.
    """
    first = adapters[0].config
    for other in adapters[1:]:
        for key in (*settings_of(first), *apart):
            mine, its = getattr(first, key), getattr(other.config, key)
            if mine != its:
                raise ValueError(
                    f"{what}: needs adapters that agree in {key}; {adapters[0].name!r} has {mine!r}, "
                    f"{other.name!r} has {its!r}. Call the model for each."
                )

"""`toast.probe`: shows on a live model that it is steered where its family row says.

One signal is changed at a time. The values of that block must then move, all of them; its queries and keys,
and everything that happens below, must keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toast.adapter import Adapter
from toast.compiled import eagerly
from toast.families.anatomy import Unit
from toast.passes import Observer
from toast.signals import Signal
from toast.steering import steering_of
from toast.thread_state import observing


@dataclass(frozen=True)
class ProbedUnit:
    """What happened when the signal of one value projection was changed.

    Args:
        name: Path of the projection in the model.
        values_moved: Whether all values of its attention moved.
        queries_and_keys_kept: Whether its queries and keys are the same to the bit; None if the kernel keeps
            them to itself.
        below_kept: Whether all that entered this block and those below is the same to the bit.
    """

    name: str
    values_moved: bool
    queries_and_keys_kept: bool | None
    below_kept: bool

    @property
    def proved(self) -> bool:
        """Whether the projection is steered as the method says."""
        return self.values_moved and self.queries_and_keys_kept is True and self.below_kept


@dataclass(frozen=True)
class Probe:
    """The result of `toast.probe`; printed, it is a table.

    Args:
        family: Name of the family row.
        units: One entry a value projection, bottom first.
        zero_is_plain: Whether zero signals give the plain model's output to the bit.
    """

    family: str
    units: list[ProbedUnit]
    zero_is_plain: bool

    @property
    def proved(self) -> bool:
        """Whether every block is steered as the method says."""
        return self.zero_is_plain and all(unit.proved for unit in self.units)

    def __str__(self) -> str:
        """Returns the table."""
        width = max(len(unit.name) for unit in self.units)
        words = {True: "yes", False: "NO", None: "unseen"}
        lines = [f"{'value projection':{width}}  V moves  Q, K kept  below kept"]
        for unit in self.units:
            q_and_k = words[unit.queries_and_keys_kept]
            lines.append(
                f"{unit.name:{width}}  {words[unit.values_moved]:7}  {q_and_k:9}  {words[unit.below_kept]}"
            )
        lines.append(f"zero signals give the plain output to the bit: {words[self.zero_is_plain]}")
        return f"family {self.family}: {'proved' if self.proved else 'NOT PROVED'}\n" + "\n".join(lines)


@torch.no_grad()
def probe(model: nn.Module, *inputs: Any, **kwargs: Any) -> Probe:
    """Changes the signal of one block at a time and looks what moves.

    Args:
        model: A wrapped model with an active adapter.
        *inputs: Inputs of one call; without any, random ones are made where the model says how they look.
        **kwargs: Further inputs.

    Returns:
        What was seen; `proved` is the verdict.

    Raises:
        ValueError: If the model is not wrapped, or says nothing of its inputs and none were passed.
    """
    steering, adapter = steering_of(model, "probe")
    if not inputs and not kwargs:
        kwargs = sample_inputs(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()

    def run(moved: Unit | None) -> _Run:
        recorder = _Run(moved, adapter)
        with observing(steering, recorder), _AttentionInputs(recorder), eagerly(model):
            recorder.output = _first_tensor(model(*inputs, **kwargs))
        return recorder

    try:
        still = run(None)
        with steering.holding(None):
            plain = _first_tensor(model(*inputs, **kwargs))
        units = [_compare(maps.unit, still, run(maps.unit)) for maps in adapter.maps]
    finally:
        for module, training in modes:
            module.training = training
    assert still.output is not None
    return Probe(steering.family.name, units, torch.equal(still.output, plain))


def sample_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Returns random inputs of a transformers or timm model, as its configuration describes them.

    Raises:
        ValueError: If it does not.
    """
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    some = next(model.parameters())
    dtype = some.dtype if some.dtype.is_floating_point else torch.get_default_dtype()
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        words = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        tokens = torch.randint(1, words, (1, 8), generator=generator)
        return {"input_ids": tokens.to(some.device)}
    size: Any = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if name != "pixel_values":  # timm
        name, cfg = "x", getattr(model, "pretrained_cfg", None) or {}
        channels, *size = cfg.get("input_size", (3,))
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    if not size:
        raise ValueError(
            f"{type(model).__name__} does not say what its inputs look like; pass some: "
            "toast.probe(model, inputs)."
        )
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(1, channels, height, width, generator=generator)
    return {name: image.to(some.device, dtype)}


class _Run(Observer):
    """One call with zero signals, but for one block."""

    wants_states = True
    replaces_signals = True

    def __init__(self, moved: Unit | None, adapter: Adapter) -> None:
        self.moved = moved
        self.adapter = adapter
        self.states: dict[int, Tensor] = {}
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.now: int | None = None
        self.output: Tensor | None = None

    def on_block(self, number: int, unit: Unit) -> None:
        self.now = unit.number if number == 2 else None

    def on_states(self, number: int, index: int, state: Tensor) -> None:
        if number == 2:
            self.states[index] = state.clone()

    def on_signals(self, signals: dict[int, Signal]) -> dict[int, Signal]:
        replaced: dict[int, Signal] = {}
        for maps in self.adapter.maps:
            number = maps.unit.number
            signal = signals[number]
            # a tensor in the shape of the signal, also where that is composed
            if not isinstance(signal, Tensor):
                signal = maps.signal_like(signal.value_shift(torch.float32))
            noise = torch.Generator().manual_seed(0)
            random = torch.randn(signal.shape, generator=noise).to(signal)
            replaced[number] = random if maps.unit is self.moved else torch.zeros_like(signal)
        return replaced

    @property
    def has_weights(self) -> bool:
        """Whether the attention of the block that runs is computed by hand, and its weights are known."""
        return self.now is not None and "weights" in self.seen.get(self.now, {})

    def keep(self, what: str, tensor: Tensor) -> None:
        """Keeps what the attention of the block that runs works with, the first of each kind."""
        if self.now is not None:
            self.seen.setdefault(self.now, {}).setdefault(what, tensor.clone())


class _AttentionInputs(TorchFunctionMode):
    """Sees queries, keys and values, or the attention weights of one that is computed by hand."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            for what in ("query", "key", "value"):
                self.run.keep(what, named[what])
        elif name == "softmax" and out.ndim >= 3:
            self.run.keep("weights", out)
        elif name in ("matmul", "__matmul__", "bmm", "einsum") and self.run.has_weights:
            self.run.keep("value", args[-1])
        return out


def _compare(unit: Unit, still: _Run, moved: _Run) -> ProbedUnit:
    before, after = still.seen.get(unit.number, {}), moved.seen.get(unit.number, {})
    kept = [torch.equal(before[what], after[what]) for what in ("query", "key", "weights") if what in after]
    number = unit.number
    values_moved = "value" in after and bool((before["value"] != after["value"]).any(-2).all())
    if unit.layout.name == "input":  # no attention: what the module is given moves what comes out of it
        kept, values_moved = [True], not torch.equal(still.states[number + 1], moved.states[number + 1])
    return ProbedUnit(
        name=unit.name,
        values_moved=values_moved,
        queries_and_keys_kept=all(kept) if kept else None,
        below_kept=all(torch.equal(still.states[i], moved.states[i]) for i in range(number + 1)),
    )


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if hasattr(output, "values") else output
    return next(part for part in parts if isinstance(part, Tensor))

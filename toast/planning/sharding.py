"""How a run is spread over processes: what each of them holds, gathers for a moment, and sends.

A row for each way. What is assumed of them, beside their libraries' defaults without offloading:

- DDP keeps gradients a second time, in the buckets that it exchanges.
- FSDP2, as Accelerate sets it up: a block is a unit; two are whole at a time, the one that runs and the next.
  What stands outside of the blocks stays whole from the beginning to the end of a step. The feedback maps are
  units of their own. Gradients are exchanged after every micro-batch.
- Where weights are split the feedback runs token by token: composing it needs those of all blocks at once.
- DeepSpeed in half precision trains on a copy in that precision, and keeps the float32 parameters with the
  optimiser's states. ZeRO-2 splits gradients and states, ZeRO-3 the parameters, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toast.planning.weight_sizes import Weights

#: Elements that DeepSpeed holds at a time by default: `reduce_bucket_size`, `stage3_max_live_parameters` and
#: `stage3_prefetch_bucket_size` (deepspeed.ai/docs/config-json).
_BUCKET, _LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Held:
    """What a process holds through a step, in bytes, but for activations.

    Args:
        frozen: Frozen weights.
        trained: Trained weights, in the precision that they are computed with.
        gradients: Gradients when all are there.
        optimizer: States, and float32 copies of what is trained if there are any.
        buffers: What is gathered for a moment, or waits to be sent.
        step: What the optimiser needs for a moment.
    """

    frozen: float
    trained: float
    gradients: float
    optimizer: float
    buffers: float
    step: float

    @property
    def always(self) -> float:
        """All but gradients and what is momentary in the optimiser."""
        return self.frozen + self.trained + self.optimizer + self.buffers


@dataclass(frozen=True)
class Sharding:
    """One way.

    Args:
        title: What it is called.
        holds: What a process holds: of the weights, the optimiser's states and momentary bytes, the number of
            processes, and that of micro-batches.
        sends: Bytes that a process sends in a step: of the weights, the processes and the micro-batches.
        bits: Bits of a quantised base that it can be used with.
        splits_weights: Whether a process holds a share of the weights.
    """

    title: str
    holds: Callable[[Weights, float, float, int, int], Held]
    sends: Callable[[Weights, int, int], float]
    bits: tuple[int, ...]
    splits_weights: bool = False


def _whole(w: Weights, states: float, momentary: float, processes: int, micro_batches: int) -> Held:
    buckets = w.trained if processes > 1 else 0.0
    return Held(w.frozen, w.trained, w.trained, states, buckets, momentary)


def _fsdp2(w: Weights, states: float, momentary: float, processes: int, micro_batches: int) -> Held:
    n = processes
    buffers = 0.0 if n == 1 else w.rest + 2 * w.unit
    return Held(w.frozen / n, w.trained / n, w.trained / n, states / n, buffers, momentary / n)


def _zero2(w: Weights, states: float, momentary: float, processes: int, micro_batches: int) -> Held:
    n, low = processes, w.trained * w.low / 4
    master = w.trained / n if w.low < 4 else 0.0
    step = (momentary + w.trained) / n
    return Held(w.frozen, low, low / n, states / n + master, _BUCKET * w.low, step)


def _zero3(w: Weights, states: float, momentary: float, processes: int, micro_batches: int) -> Held:
    n, low = processes, w.trained * w.low / 4
    master = w.trained / n if w.low < 4 else 0.0
    live = min(w.frozen + low, _LIVE * w.low) + min(w.frozen + low, _PREFETCH * w.low)
    buffers, step = _BUCKET * w.low + live * (n > 1), (momentary + w.trained) / n
    return Held(w.frozen / n, low / n, low / n, states / n + master, buffers, step)


def _reduced(size: float, processes: int) -> float:
    """Bytes that a process sends in one half of an exchange: a scattered sum, or a gathering."""
    return size * (processes - 1) / processes


def _sends_gradients(w: Weights, processes: int, micro_batches: int) -> float:
    return 2 * _reduced(w.trained, processes)


def _sends_halves(w: Weights, processes: int, micro_batches: int) -> float:
    return 2 * _reduced(w.trained * w.low / 4, processes)  # gradients one way, new weights the other


def _gathers_all(w: Weights, trained: float) -> float:
    blocks = sum(size * count for size, count in zip(w.blocks, w.gathers, strict=True))
    return blocks + w.rest + 2 * w.maps + 2 * trained


def _sends_shards(w: Weights, processes: int, micro_batches: int) -> float:
    return _reduced((_gathers_all(w, w.trained) + w.trained) * micro_batches, processes)


def _sends_low_shards(w: Weights, processes: int, micro_batches: int) -> float:
    low = w.trained * w.low / 4
    return _reduced((_gathers_all(w, low) + low) * micro_batches, processes)


#: Every way, in the order of the table. bitsandbytes' 8-bit weights cannot be split.
SHARDINGS = {
    "none": Sharding("none", _whole, _sends_gradients, (8, 4)),
    "fsdp2": Sharding("FSDP2", _fsdp2, _sends_shards, (4,), splits_weights=True),
    "zero2": Sharding("ZeRO-2", _zero2, _sends_halves, (8, 4)),
    "zero3": Sharding("ZeRO-3", _zero3, _sends_low_shards, (4,), splits_weights=True),
}

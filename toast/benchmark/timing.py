"""Costs of several contenders, taken in turns, so that what else the machine does hits all alike.

Each ratio has its interval, its CPU time and its FLOPs beside it, and the floor that it cannot lie below: a
figure under its floor is noise, and is marked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

#: Half of the interval, as a share of the median, at which a ratio is known well enough.
WITHIN = 0.03
#: How many times the rounds that were asked for are run at most, to get there.
PATIENCE = 4
_RESAMPLES = 2_000


@dataclass(frozen=True)
class Ratio:
    """How one contender compares with the reference, over the rounds.

    Args:
        median: Median of the ratios of single rounds.
        low: Lower end of the median's 95% interval (bootstrap over rounds); of one round, the ratio itself.
        high: Its upper end.
        rounds: Number of rounds.
        cpu: Median ratio of the CPU time of the process; None if there is none to compare.
        flops: Ratio of the counted FLOPs; None if they were not counted.
        floor: What it cannot lie below, measured in the same rounds; None if nothing says.
        higher_is_better: Whether it is a ratio of speeds, so that the floor is a ceiling.
    """

    median: float
    low: float
    high: float
    rounds: int
    cpu: float | None = None
    flops: float | None = None
    floor: float | None = None
    higher_is_better: bool = False

    @classmethod
    def of(cls, ratios: Sequence[float], **beside: Any) -> Ratio:
        """Returns the median of some ratios with its interval.

        Args:
            ratios: One a round.
            **beside: Fields that are known otherwise.
        """
        low, high = interval(ratios)
        return cls(statistics.median(ratios), low, high, len(ratios), **beside)

    @property
    def is_settled(self) -> bool:
        """Whether the interval is within 3% of the median on either side; one round settles nothing."""
        return (
            self.rounds > 1 and max(self.high - self.median, self.median - self.low) <= WITHIN * self.median
        )

    @property
    def is_below_floor(self) -> bool:
        """Whether the whole interval lies where the contender cannot be: then other work was measured."""
        if self.floor is None:
            return False
        return self.low > self.floor if self.higher_is_better else self.high < self.floor

    def as_dict(self) -> dict[str, Any]:
        """Returns it for a JSON file."""
        held = asdict(self)
        held.pop("higher_is_better")
        rounded = {name: round(value, 4) for name, value in held.items() if value is not None}
        return rounded | {"settled": self.is_settled, "below_floor": self.is_below_floor}

    def __str__(self) -> str:
        """Returns median and interval, and what is to be known of them."""
        parts = [f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"]
        for name in ("cpu", "flops", "floor"):
            value = getattr(self, name)
            parts.append("" if value is None else f"{name} {value:.3f}")
        unsure = self.cpu is not None and not self.is_settled
        notes = ["BELOW ITS FLOOR"] * self.is_below_floor + [f"not within {WITHIN:.0%}"] * unsure
        return "  ".join([f"{parts[0]:24}", *(f"{part:11}" for part in parts[1:]), ", ".join(notes)]).rstrip()


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Args:
        run: Runs it once.
        floor: Names of contenders whose costs together it cannot lie below.
        shown: Whether it is compared; otherwise it is only a part of floors.
    """

    run: Callable[[], object]
    floor: tuple[str, ...] = ()
    shown: bool = True


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Args:
        seconds: By the clock.
        cpu: Of the process on all cores.
    """

    seconds: float
    cpu: float


def in_turns(
    contenders: Mapping[str, Contender],
    reference: str,
    rounds: int,
    higher_is_better: bool = False,
    device: torch.device | None = None,
) -> dict[str, Ratio]:
    """Runs every contender once a round and compares it with the reference of the same round.

    The order is turned around from round to round, so that a drift of the clock rate cancels. Rounds go on
    until every interval is within 3% of its median, `PATIENCE` times as many as were asked for at most.

    Args:
        contenders: What is timed, by name. Their first, uncounted run is the warm-up and counts FLOPs.
        reference: Name of what the others are compared with.
        rounds: Number of rounds, at least.
        higher_is_better: Whether the ratio is that of speeds and not of times.
        device: What it runs on; an accelerator is waited for before and after each run.

    Returns:
        The ratio of each contender that is shown, the reference's own aside.
    """
    flops = {name: counted_flops(contender.run) for name, contender in contenders.items()}
    for contender in contenders.values():  # compiled and fused kernels have warmed up under no counter
        _cost(contender.run, device)
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    shown = [name for name, contender in contenders.items() if contender.shown and name != reference]
    found: dict[str, Ratio] = {}
    most = PATIENCE * rounds if rounds > 1 else 1
    for number in tqdm(range(most), "rounds, at most", unit="round", leave=False, disable=None):
        for name in list(contenders) if number % 2 else list(contenders)[::-1]:
            costs[name].append(_cost(contenders[name].run, device))
        if number + 1 < rounds:
            continue
        found = {
            name: _compared(name, contenders[name].floor, reference, costs, flops, higher_is_better)
            for name in shown
        }
        if all(ratio.is_settled for ratio in found.values()):
            break
    return found


def _compared(
    name: str,
    floor: Sequence[str],
    reference: str,
    costs: Mapping[str, Sequence[Cost]],
    flops: Mapping[str, int],
    higher_is_better: bool,
) -> Ratio:
    def ratio(mine: float, its: float) -> float:
        return its / mine if higher_is_better else mine / its

    pairs = list(zip(costs[name], costs[reference], strict=True))
    cpu = [ratio(mine.cpu, its.cpu) for mine, its in pairs if mine.cpu and its.cpu]
    bound = None
    if floor:
        least = [sum(costs[part][i].seconds for part in floor) for i in range(len(pairs))]
        bound = statistics.median(ratio(least[i], its.seconds) for i, (_, its) in enumerate(pairs))
    return Ratio.of(
        [ratio(mine.seconds, its.seconds) for mine, its in pairs],
        cpu=statistics.median(cpu) if cpu else None,
        flops=ratio(flops[name], flops[reference]) if flops[name] and flops[reference] else None,
        floor=bound,
        higher_is_better=higher_is_better,
    )


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Returns the bootstrap interval of the median of some values; of one value, the value itself."""
    if len(values) == 1:
        return values[0], values[0]
    chosen = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    medians = torch.tensor(values, dtype=torch.float64)[chosen].quantile(0.5, dim=1)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = medians.quantile(ends).tolist()
    return low, high


def counted_flops(run: Callable[[], object]) -> int:
    """Returns the FLOPs of a run's products, attention included.

    Attention is counted by its products (`SDPBackend.MATH`), because PyTorch does not count its fused kernel
    on CPUs.
    """
    counter = FlopCounterMode(display=False)
    # Its own hooks the gradients of every module's inputs, which inference mode has none of.
    counter.mod_tracker = _WholeModel()  # type: ignore[assignment]
    with (
        torch.compiler.set_stance("force_eager"),  # what is compiled hides its products
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        run()
    return int(counter.get_total_flops())


class _WholeModel:
    """Stands for the counter's record of modules, where the sum over all of them is wanted."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing is hooked."""

    def __exit__(self, *error: object) -> None:
        """Nothing is taken off."""


def _cost(run: Callable[[], object], device: torch.device | None) -> Cost:
    _wait(device)
    start, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)

"""Times of several contenders, taken in turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """How one contender compares with the reference, over the rounds.

    Args:
        median: Median of the ratios of single rounds.
        low: Least of them.
        high: Greatest of them.
        rounds: Number of rounds.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        """Returns the median and the spread of some ratios."""
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def as_dict(self) -> dict[str, Any]:
        """Returns it for a JSON file."""
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """Returns the median and the spread."""
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int,
    higher_is_better: bool = False,
    warm_up: int = 1,
) -> dict[str, Ratio]:
    """Runs every contender once a round and compares it with the reference of the same round.

    The order is turned around from round to round, so that a drift of the clock rate cancels.

    Args:
        contenders: What is timed, by name.
        reference: Name of what the others are compared with.
        rounds: Number of rounds.
        higher_is_better: Whether the ratio is that of speeds and not of times.
        warm_up: Rounds that are not counted.

    Returns:
        The ratio of each contender, the reference's own aside.
    """
    ratios: dict[str, list[float]] = {name: [] for name in contenders if name != reference}
    for number in range(-warm_up, rounds):
        names = list(contenders) if number % 2 else list(contenders)[::-1]
        seconds = {name: _seconds(contenders[name]) for name in names}
        if number < 0:
            continue
        for name, found in ratios.items():
            ratio = seconds[name] / seconds[reference]
            found.append(1 / ratio if higher_is_better else ratio)
    return {name: Ratio.of(found) for name, found in ratios.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

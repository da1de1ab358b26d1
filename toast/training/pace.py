"""How long a step takes, honestly: over spans at whose ends the device has done its work."""

from __future__ import annotations

import statistics
from collections import deque

#: Spans that are kept; what is reported is the pace of the last ones of a long run.
MOST = 1000


class Pace:
    """Seconds a step, as the median over spans of steps.

    A step on an accelerator returns before it is done, so the time of a single one says little. A span ends
    where its losses are read, which waits for the device. The median leaves aside what warms up or is
    disturbed.
    """

    def __init__(self) -> None:
        self.spans: deque[float] = deque(maxlen=MOST)
        self._marked = 0.0

    def start(self, seconds: float) -> None:
        """Begins a span at so many seconds of steps."""
        self._marked = seconds

    def note(self, seconds: float, steps: int) -> None:
        """Ends a span of some steps at so many seconds of steps, and begins the next."""
        self.spans.append((seconds - self._marked) / steps)
        self._marked = seconds

    @property
    def median(self) -> float | None:
        """Median of the seconds a step; None before the first span has ended."""
        return round(statistics.median(self.spans), 5) if self.spans else None

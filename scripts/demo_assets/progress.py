"""Print how far a long loop of the demonstration's build is."""

from __future__ import annotations

import time


class Clock:
    """Prints progress with the time left, at most every `every` seconds."""

    def __init__(self, total: int, name: str, every: float = 30.0) -> None:
        self.total, self.name, self.every = total, name, every
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()

    def tick(self, count: int, note: str = "") -> None:
        """Count `count` more as done and print where it is time to."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every or self.done >= self.total:
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / rate
            print(
                f"{self.name}: {self.done}/{self.total}  {rate:.0f}/s  {left:.0f} s left  {note}", flush=True
            )
            self.last = now

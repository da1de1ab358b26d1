"""Counts the pictures that could not be decoded, and stops a run that meets too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable

log = logging.getLogger(__name__)

_SHOWN = 5


class BadSamples:
    """The pictures of a run that could not be decoded, each counted and logged once.

    Args:
        limit_share: Largest share of bad pictures that a run bears, 0 to 1.
        total: Number of pictures that the share is of.

    Raises:
        ValueError: If the share or the total does not suit.
    """

    def __init__(self, limit_share: float, total: int) -> None:
        if not 0 <= limit_share <= 1 or total < 1:
            raise ValueError(
                f"limit_share must be 0 to 1 and total at least 1; got {limit_share} and {total}."
            )
        self.limit_share = limit_share
        self.total = total
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Counts pictures that are new among these, each a name and a reason.

        Raises:
            ValueError: If more than the share are bad by now.
        """
        for name, reason in bad:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("picture skipped: %s: %s", name, reason)
        if len(self.reasons) > self.limit_share * self.total:
            raise ValueError(
                f"{self.summary()}\nThat is more than the share of {self.limit_share:g} that is allowed. "
                "Fix or remove these files (an interrupted download or unpacking is the usual cause), or "
                "raise the limit."
            )

    def summary(self) -> str:
        """Returns how many were bad, and the first of them with their reasons."""
        if not self.reasons:
            return f"none of {self.total} pictures was bad"
        first = [f"\n  {name}: {reason}" for name, reason in list(self.reasons.items())[:_SHOWN]]
        more = f"\n  and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return f"{len(self)} of {self.total} pictures could not be decoded:{''.join(first)}{more}"

"""Counts what was met in pictures that a run should know of, though it stops nothing."""

from __future__ import annotations

from collections.abc import Iterable


class Notes:
    """What was met in the pictures of a run: each kind reported once, and counted."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._first: dict[str, str] = {}

    def add(self, notes: Iterable[tuple[str, str]]) -> list[str]:
        """Counts notes, each a picture's name and what was met.

        Returns:
            A line for each kind that was not met before.
        """
        new = []
        for name, note in notes:
            if note not in self._first:
                self._first[note] = name
                new.append(f"{name} {note}; further ones are counted.")
            self._names.setdefault(note, set()).add(name)
        return new

    def summary(self) -> list[str]:
        """Returns a line for each kind: how many pictures, and the first of them."""
        return [f"{len(self._names[note]):,} × {note}: first {self._first[note]}" for note in self._names]

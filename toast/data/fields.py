"""What is known of samples by name: the columns of a list, the fields of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fields:
    """Values of samples by name, as they were read.

    Args:
        columns: Name -> one value a sample.
        places: Where each sample's values stand, for messages.
    """

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]

    def subset(self, indices: Iterable[int]) -> Fields:
        """Returns the values of some samples, in the given order."""
        chosen = list(indices)
        columns = {name: [held[index] for index in chosen] for name, held in self.columns.items()}
        return Fields(columns, [self.places[index] for index in chosen])

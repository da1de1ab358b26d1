"""What was written of each part of a store: a record of checksums, so that damage is found and mended."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path


class Records:
    """A file of records of one length: the CRC-32 of a part's rows in each tensor, and one over the record.

    A record that is all zeros says that its part is not written. Processes write records of different parts
    at the same time.

    Args:
        path: The file.
        parts: How many parts there are.
        tensors: Checksums of a record.
    """

    def __init__(self, path: Path, parts: int, tensors: int) -> None:
        self.path = path
        self.parts = parts
        self._sums = struct.Struct(f"<{tensors}I")
        self._size = self._sums.size + 4

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.parts * self._size

    def read(self) -> dict[int, tuple[int, ...] | None]:
        """Returns the checksums of the parts that are written, by part; None of a record that is damaged.

        Raises:
            OSError: If the file is there and cannot be read.
        """
        data = self.path.read_bytes() if self.path.is_file() else b""
        found: dict[int, tuple[int, ...] | None] = {}
        for part in range(min(self.parts, len(data) // self._size)):
            record = data[part * self._size : (part + 1) * self._size]
            sums = record[: self._sums.size]
            if any(record):
                whole = record == sums + self._check(part, sums)
                found[part] = self._sums.unpack(sums) if whole else None
        return found

    def write(self, part: int, sums: Sequence[int]) -> None:
        """Says that a part is written."""
        packed = self._sums.pack(*sums)
        self._put(part, packed + self._check(part, packed))

    def clear(self, part: int) -> None:
        """Says that a part is not written."""
        self._put(part, bytes(self._size))

    def _put(self, part: int, record: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(part * self._size)
            file.write(record)

    def _check(self, part: int, sums: bytes) -> bytes:
        # With the number, so that a record which stands at another's place is not taken.
        return struct.pack("<I", zlib.crc32(struct.pack("<I", part) + sums))

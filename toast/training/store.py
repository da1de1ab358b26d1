"""Tensors by sample in memory-mapped files: written once, in parts, by several processes; read in any order.

header.json    what the tensors were computed from, their shapes and types
NAME.bin       all samples' rows of one tensor, one after the other
done.bin       a byte for each part: whether it is written
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toast.training.folder import read_json, write_json

_HEADER = "header.json"
_PART = 64


@dataclass(frozen=True)
class Rows:
    """The shape of one tensor's rows.

    Args:
        shape: Of one sample, `(tokens, width)` for example; a first dimension of None is the sample's own
            length.
        dtype: As PyTorch names it, such as `bfloat16`.
    """

    shape: tuple[int | None, ...]
    dtype: str

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return math.prod(size for size in self.shape[1:] if size is not None)

    @property
    def bytes(self) -> int:
        """Bytes of one token."""
        return self.width * torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


class Store:
    """Tensors of samples on disk.

    Args:
        folder: Where the files are.
        fingerprint: What the tensors are a function of; another one is refused.
        lengths: Tokens of each sample; a sample of fixed shape has as many as its first dimension.
        tensors: Shapes by name.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], lengths: Sequence[int], tensors: dict[str, Rows]
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.tensors = tensors
        self.offsets = [0, *itertools.accumulate(lengths)]
        self._maps: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self.offsets[-1] * sum(rows.bytes for rows in self.tensors.values())

    @property
    def parts(self) -> list[range]:
        """Samples of each part that is written at a time."""
        count = len(self.offsets) - 1
        return [range(start, min(start + _PART, count)) for start in range(0, count, _PART)]

    def header(self) -> dict[str, Any]:
        """Returns what the header holds."""
        held = {
            "fingerprint": self.fingerprint,
            "samples": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "tensors": {name: [list(rows.shape), rows.dtype] for name, rows in self.tensors.items()},
        }
        return json.loads(json.dumps(held))  # type: ignore[no-any-return]

    def create(self) -> None:
        """Makes the files, or takes those over that an interrupted run has left; one process does this.

        Raises:
            ValueError: If the folder holds something else, with what differs; or there is no room.
        """
        place = self.folder / _HEADER
        if place.is_file():
            self._refuse_stale(read_json(place))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.size > free:
            raise ValueError(
                f"first_pass: {self.folder} needs {self.size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are "
                "free. "
                "Set first_pass.folder to a larger disk, or first_pass.mode=computed."
            )
        for name, rows in self.tensors.items():
            with (self.folder / f"{name}.bin").open("wb") as file:
                file.truncate(self.offsets[-1] * rows.bytes)
        (self.folder / "done.bin").write_bytes(bytes(len(self.parts)))
        write_json(place, self.header())

    def _refuse_stale(self, found: dict[str, Any]) -> None:
        wanted = self.header()
        if found == wanted:
            return
        before, now = found.get("fingerprint", {}), wanted["fingerprint"]
        differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        differ = differ or [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"first_pass: what {self.folder} holds was computed from another {', '.join(differ)}. Delete the "
            "folder, or set first_pass.folder to another."
        )

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not written yet."""
        return [part for part, done in enumerate((self.folder / "done.bin").read_bytes()) if not done]

    def write(self, part: int, samples: dict[str, list[Tensor]]) -> None:
        """Writes the tensors of a part's samples, each of its row's shape, and marks the part as written."""
        rows = self.parts[part]
        for name, tensors in samples.items():
            held = self._map(name)
            for sample, tensor in zip(rows, tensors, strict=True):
                start, end = self.offsets[sample], self.offsets[sample + 1]
                held[start:end] = tensor.to(held.dtype).cpu().reshape(end - start, -1)
        with (self.folder / "done.bin").open("r+b") as file:
            file.seek(part)
            file.write(b"\1")

    def read(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """Returns the tensors of some samples as batches; samples that are shorter are padded with zeros."""
        lengths = [self.offsets[sample + 1] - self.offsets[sample] for sample in samples]
        batch: dict[str, Tensor] = {}
        for name, rows in self.tensors.items():
            held = self._map(name)
            out = held.new_zeros(len(samples), max(lengths), held.shape[1])
            for place, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
                out[place, :length] = held[self.offsets[sample] : self.offsets[sample] + length]
            first = max(lengths) if rows.shape[0] is None else rows.shape[0]
            batch[name] = out.view(
                len(samples), first, *(size for size in rows.shape[1:] if size is not None)
            )
        return batch

    def _map(self, name: str) -> Tensor:
        if name not in self._maps:
            rows = self.tensors[name]
            flat = torch.from_file(
                str(self.folder / f"{name}.bin"),
                shared=True,
                size=self.offsets[-1] * rows.width,
                dtype=getattr(torch, rows.dtype),
            )
            self._maps[name] = flat.view(self.offsets[-1], rows.width)
        return self._maps[name]

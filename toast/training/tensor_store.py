"""Tensors by sample in files: written once, in parts, by several processes; read in any order.

header.json    what the tensors were computed from, their shapes and types
NAME.bin       all samples' rows of one tensor, one after the other
parts.bin      a record for each part: whether it is written, with checksums

Rows are read and written by calls, not through mapped memory: a full or broken disk, or a file that another
program cuts off, is then an error with a message, where a mapped page would end the process by SIGBUS.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toast.files.json_files import Kinds, read_json
from toast.training.run_folder import write_json
from toast.training.store_records import Records

_HEADER = "header.json"
_RECORDS = "parts.bin"
#: What a header holds.
_KEYS: dict[str, Kinds] = {"fingerprint": dict, "samples": int, "tokens": int, "tensors": dict}
_PART = 64
#: Bytes that are read at a time to compare checksums.
_CHUNK = 2**22


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
        setting: What says where it is, for messages.
        advice: What to do where the disk is too small or broken, for messages.

    Attributes:
        unread: Samples that could not be read when they were to be computed; their rows hold zeros.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        lengths: Sequence[int],
        tensors: dict[str, Rows],
        setting: str = "first_pass",
        advice: str = "Set first_pass.folder to another disk, or first_pass.mode=computed.",
    ) -> None:
        self.setting = setting
        self.advice = advice
        self.folder = folder
        self.fingerprint = fingerprint
        self.tensors = tensors
        self.offsets = [0, *itertools.accumulate(lengths)]
        self.unread: frozenset[int] = frozenset()
        self.records = Records(folder / _RECORDS, len(self.parts), len(tensors))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self.offsets[-1] * sum(rows.bytes for rows in self.tensors.values())

    @property
    def parts(self) -> list[range]:
        """Samples of each part that is written at a time."""
        count = len(self.offsets) - 1
        return [range(start, min(start + _PART, count)) for start in range(0, count, _PART)]

    def tokens(self, sample: int) -> int:
        """Returns the tokens of a sample."""
        return self.offsets[sample + 1] - self.offsets[sample]

    def make_folder(self) -> None:
        """Makes the folder.

        Raises:
            ValueError: If it cannot be made.
        """
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)

    def header(self) -> dict[str, Any]:
        """Returns what the header holds."""
        held = {
            "fingerprint": self.fingerprint,
            "samples": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "tensors": {name: [list(rows.shape), rows.dtype] for name, rows in self.tensors.items()},
        }
        return json.loads(json.dumps(held))  # type: ignore[no-any-return]

    def create(self) -> list[str]:
        """Makes the files, or takes those over that an earlier run has left; one process does this.

        The space is reserved at once, so that a disk which is too small is known before anything is computed.

        Returns:
            What was wrong with the files of an earlier run, and has been made anew: without values, so that
            `verify` finds the parts that lie in it.

        Raises:
            ValueError: If the folder holds something else, with what differs; or there is no room.
        """
        place, wrong, anew = self.folder / _HEADER, [], True
        if place.exists():
            try:
                found = read_json(place, _KEYS)
            except ValueError as error:
                wrong.append(f"{error} It is written again, and everything that it describes is recomputed.")
            else:
                self._refuse_stale(found)
                anew = False
        elif any(path.is_file() and path.stat().st_size for path in map(self._path, self.tensors)):
            wrong.append(f"{place} does not exist. Everything that it would describe is recomputed.")
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            if anew:
                self.records.path.unlink(missing_ok=True)
            wanted = {self._path(name): self.offsets[-1] * rows.bytes for name, rows in self.tensors.items()}
            wanted[self.records.path] = self.records.size
            sizes = {path: path.stat().st_size if path.is_file() else None for path in wanted}
            self._refuse_no_room(sum(max(0, size - (sizes[path] or 0)) for path, size in wanted.items()))
            for path, size in wanted.items():
                if sizes[path] != size:
                    if not anew:
                        held = "not there" if sizes[path] is None else f"of {sizes[path]:,} bytes"
                        wrong.append(f"{path} is {held}; it was written with {size:,} bytes.")
                    _reserve(path, size)
            if anew:
                write_json(place, self.header())
        return wrong

    def _refuse_no_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.setting}: {self.folder} needs {needed / 2**30:,.3g} GiB, {free / 2**30:,.3g} GiB are "
                f"free. {self.advice}"
            )

    def _refuse_stale(self, found: dict[str, Any]) -> None:
        wanted = self.header()
        if found == wanted:
            return
        before, now = found["fingerprint"], wanted["fingerprint"]
        differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        differ = differ or [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"{self.setting}: what {self.folder} holds was computed from another {', '.join(differ)}. Delete "
            f"the folder if it is no longer needed. {self.advice}"
        )

    def verify(self, parts: Iterable[int]) -> list[int]:
        """Compares parts with the checksums that were noted when they were written; reads them once.

        Args:
            parts: Numbers of the parts to compare; those that are not written are passed over. Processes
                share them.

        Returns:
            Those that are damaged; they count as not written from now on.

        Raises:
            ValueError: If a damaged part cannot be marked.
        """
        with self._explained():
            noted = self.records.read()
            written = (part for part in parts if part in noted)
            damaged = [part for part in written if noted[part] is None or self._sums(part) != noted[part]]
            for part in damaged:
                self.records.clear(part)
        return damaged

    def _sums(self, part: int) -> tuple[int, ...] | None:
        """Returns the checksums of what a part's files hold; None if they cannot be read."""
        try:
            return tuple(self._sum(name, *self._span(name, part)) for name in self.tensors)
        except OSError:  # of a disk that is broken at this place
            return None

    def _sum(self, name: str, start: int, size: int) -> int:
        found = 0
        with self._path(name).open("rb", buffering=0) as file:
            file.seek(start)
            while size > 0 and (chunk := file.read(min(size, _CHUNK))):
                found = zlib.crc32(chunk, found)
                size -= len(chunk)
        return found

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not written yet.

        Raises:
            ValueError: If this cannot be read.
        """
        with self._explained():
            noted = self.records.read()
        return [part for part in range(self.records.parts) if noted.get(part) is None]

    def write(self, part: int, samples: dict[str, list[Tensor]], is_whole: bool = True) -> None:
        """Writes the tensors of a part's samples, each of its row's shape.

        Args:
            part: Number of the part.
            samples: By tensor, one a sample.
            is_whole: Whether the part is marked as written; else it is missing the next time.

        Raises:
            ValueError: If it cannot be written.
        """
        sums = []
        lengths = [self.tokens(sample) for sample in self.parts[part]]
        for name, rows in self.tensors.items():
            dtype = getattr(torch, rows.dtype)
            held = [
                tensor.detach().to("cpu", dtype).reshape(length, rows.width)
                for tensor, length in zip(samples[name], lengths, strict=True)
            ]
            data: Any = _bytes(torch.cat(held))
            with self._explained(), self._path(name).open("r+b") as file:
                file.seek(self._span(name, part)[0])
                file.write(data)
            sums.append(zlib.crc32(data))
        if is_whole:
            with self._explained():
                self.records.write(part, sums)

    def read(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """Returns the tensors of some samples as batches; samples that are shorter are padded with zeros.

        Raises:
            ValueError: If they cannot be read.
        """
        lengths = [self.tokens(sample) for sample in samples]
        batch: dict[str, Tensor] = {}
        for name, rows in self.tensors.items():
            out = torch.zeros(len(samples), max(lengths), rows.width, dtype=getattr(torch, rows.dtype))
            with self._explained("read"), self._path(name).open("rb", buffering=0) as file:
                for place, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
                    file.seek(self.offsets[sample] * rows.bytes)
                    into = _bytes(out[place, :length])
                    if file.readinto(into) != into.nbytes:
                        raise OSError(errno.EIO, "it was cut off while the run was reading it")
            first = max(lengths) if rows.shape[0] is None else rows.shape[0]
            batch[name] = out.view(
                len(samples), first, *(size for size in rows.shape[1:] if size is not None)
            )
        return batch

    def _span(self, name: str, part: int) -> tuple[int, int]:
        """Returns where a part's rows begin in a tensor's file, and how many bytes they are."""
        samples, size = self.parts[part], self.tensors[name].bytes
        start, end = self.offsets[samples.start], self.offsets[samples.stop]
        return start * size, (end - start) * size

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    @contextmanager
    def _explained(self, what: str = "written") -> Iterator[None]:
        """Turns an error of the disk into one that says what to do.

        Raises:
            ValueError: If there was one.
        """
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.setting}: {error.filename or self.folder} cannot be {what}: "
                f"{error.strerror or error}. {self.advice}"
            ) from error


def _bytes(tensor: Tensor) -> Any:
    """Returns the memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _reserve(path: Path, size: int) -> None:
    """Gives a file its size, and the room on the disk for it where the system can.

    Raises:
        OSError: If there is no room; the file has its size of before then.
    """
    with path.open("r+b" if path.is_file() else "wb") as file:
        before = os.fstat(file.fileno()).st_size
        try:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                file.truncate(before)
                raise OSError(error.errno, error.strerror, str(path)) from error

"""Rows of a store come back as they were written, and what is damaged is found."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toast.training.tensor_store import Rows, Store

LENGTHS = [2, 4, 1, 3, 5, 2, 1]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of four parts of two samples, all written."""
    monkeypatch.setattr("toast.training.tensor_store._PART", 2)
    made = _store(tmp_path / "store")
    assert made.create() == []
    held = _rows()
    for part, rows in enumerate(made.parts):
        made.write(part, {name: [tensors[i] for i in rows] for name, tensors in held.items()})
    return made


def _store(folder: Path) -> Store:
    return Store(
        folder, {"x": 1}, LENGTHS, {"a": Rows((None, 3), "bfloat16"), "b": Rows((None, 2), "float64")}
    )


def _rows() -> dict[str, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return {
        "a": [torch.randn(n, 3, generator=draw).bfloat16() for n in LENGTHS],
        "b": [torch.randn(n, 2, generator=draw, dtype=torch.float64) for n in LENGTHS],
    }


def test_rows_come_back(store: Store) -> None:
    held, again = _rows(), _store(store.folder)
    assert store.size == sum(LENGTHS) * (3 * 2 + 2 * 8)
    assert again.create() == [] and again.missing() == [] and again.verify(range(4)) == []
    read = again.read([2, 1])
    assert read["a"].shape == (2, 4, 3)
    assert torch.equal(read["a"][1], held["a"][1]) and torch.equal(read["b"][0, :1], held["b"][2])
    assert not read["a"][0, 1:].any()


def test_a_folder_that_cannot_be_written_is_read(store: Store) -> None:
    for path in store.folder.iterdir():
        path.chmod(0o444)
    store.folder.chmod(0o555)
    again = _store(store.folder)
    assert again.create() == [] and again.verify(range(4)) == [] and again.missing() == []
    assert again.read([0])["a"].shape == (1, 2, 3)


def _flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _swapped(path: Path) -> None:
    """Exchanges the records of the first two parts."""
    data = path.read_bytes()
    path.write_bytes(data[12:24] + data[:12] + data[24:])


DAMAGES: dict[str, tuple[Callable[[Path], object], list[int], list[int]]] = {
    # what is done, which parts are damaged, which are missing then
    "first byte": (lambda at: _flipped(at / "a.bin", 0), [0], [0]),
    "last byte": (lambda at: _flipped(at / "b.bin", -1), [3], [3]),
    "cut off": (lambda at: os.truncate(at / "a.bin", 18 * 3 * 2 - 30), [2, 3], [2, 3]),
    "zeros": (lambda at: (at / "b.bin").write_bytes(bytes(18 * 16)), [0, 1, 2, 3], [0, 1, 2, 3]),
    "removed": (lambda at: (at / "b.bin").unlink(), [0, 1, 2, 3], [0, 1, 2, 3]),
    "longer": (lambda at: os.truncate(at / "a.bin", 200), [], []),
    "record": (lambda at: _flipped(at / "parts.bin", 14), [1], [1]),
    "records swapped": (lambda at: _swapped(at / "parts.bin"), [0, 1], [0, 1]),
    "records cut off": (lambda at: os.truncate(at / "parts.bin", 30), [2], [2, 3]),
    "records removed": (lambda at: (at / "parts.bin").unlink(), [], [0, 1, 2, 3]),
    "ones": (lambda at: (at / "parts.bin").write_bytes(b"\1" * 48), [0, 1, 2, 3], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(store: Store, name: str) -> None:
    damage, damaged, missing = DAMAGES[name]
    damage(store.folder)
    again = _store(store.folder)
    remarks = again.create()
    assert bool(remarks) == (name in ("cut off", "removed", "longer", "records cut off", "records removed"))
    assert again.verify(range(4)) == damaged
    assert again.missing() == missing
    held = _rows()
    for part in missing:
        again.write(part, {key: [tensors[i] for i in again.parts[part]] for key, tensors in held.items()})
    last = _store(store.folder)
    assert last.create() == [] and last.verify(range(4)) == [] and last.missing() == []
    assert torch.equal(last.read([4])["b"][0], held["b"][4])


def test_files_that_are_cut_off_while_they_are_read_are_an_error(store: Store) -> None:
    store.read([6])
    os.truncate(store.folder / "b.bin", 100)
    with pytest.raises(ValueError, match=r"cannot be read: it was cut off .* first_pass\.mode=computed"):
        store.read([6])


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", {}, [10**12], {"a": Rows((None, 1024), "float32")})
    with pytest.raises(ValueError, match=r"needs .* GiB, .* GiB are free"):
        store.create()
    assert not list((tmp_path / "store").iterdir())


def test_room_that_cannot_be_reserved_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota, or another program that fills the disk meanwhile."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"a\.bin cannot be written: No space left on device\. Set first_"):
        _store(tmp_path).create()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0

    def foreign(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "a file system that reserves nothing")

    monkeypatch.setattr(os, "posix_fallocate", foreign)
    assert _store(tmp_path).create() == []


def test_a_disk_that_is_full_when_a_part_is_written_is_an_error(tmp_path: Path) -> None:
    """In another process, whose files may not become larger: a signal would end it without a message."""
    code = f"""
import resource, torch
from pathlib import Path
from toast.training.tensor_store import Rows, Store
store = Store(Path({str(tmp_path)!r}), {{}}, [1000], {{"a": Rows((None, 10), "float32")}})
store.create()
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    store.write(0, {{"a": [torch.zeros(1000, 10)]}})
except ValueError as error:
    print(error, store.missing())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large. Set first_pass.folder" in done.stdout
    assert "[0]" in done.stdout

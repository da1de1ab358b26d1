"""Encodings of text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from toast.files.plain_text import half_pair, read_lines, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes("é: 1\r\nb\n".encode(encoding))
    assert read_text(tmp_path / "a") == "é: 1\nb\n"
    assert [line.rstrip() for _, line in read_lines(tmp_path / "a")][:2] == ["é: 1", "b"]


def test_the_line_of_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("a\nb\ncafé".encode("latin-1"))
    for read in (read_text, lambda file: list(read_lines(file))):
        with pytest.raises(ValueError, match=r"a, line 3: not UTF-8: .* byte 0xe9 at byte"):
            read(tmp_path / "a")
    with pytest.raises(ValueError, match="is a folder; needs a text file"):
        read_text(tmp_path)


def test_halves_of_pairs() -> None:
    assert half_pair("ab😀") is None
    assert half_pair("ab\ud83d") == "\\ud83d, character 3"
    assert half_pair("\udce9") == "\\udce9, character 1"

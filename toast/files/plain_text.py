"""Text files as people have them: UTF-8, or what a byte order mark says; else file and line of the fault."""

from __future__ import annotations

import codecs
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from toast.files.atomic import read_regular, refuse_special

#: UTF-32's mark begins with that of UTF-16. Python's codecs of these names take the mark off.
_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(content: bytes) -> str:
    """Returns the encoding that the first bytes of a file say by a byte order mark; without one, UTF-8."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")


def decode_text(content: bytes, place: str) -> str:
    """Returns bytes as text.

    Args:
        content: The bytes of a whole file.
        place: What the file is called in messages.

    Raises:
        ValueError: If they are in another encoding than they say; it names the line and the byte.
    """
    encoding = encoding_of(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(_fault(f"{place}, line {line}", encoding, content, error)) from None


def read_text(file: Path) -> str:
    """Reads a text file; the ends of its lines become line feeds.

    Raises:
        ValueError: If it cannot be read, or is in another encoding than it says.
        FileNotFoundError: If it is not there.
    """
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return decode_text(read_regular(file, "text file"), str(file)).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields each line of a text file behind its place, `FILE, line N`; of UTF-8 one at a time in memory.

    Raises:
        ValueError: If the file is not there, no regular file, or in another encoding than it says.
    """
    refuse_special(file, "text file")
    with file.open("rb") as stream:
        encoding = encoding_of(stream.read(4))
        stream.seek(0)
        if not encoding.startswith("utf-8"):
            whole = decode_text(stream.read(), str(file))
            for number, text in enumerate(whole.split("\n"), 1):
                yield f"{file}, line {number}", text
            return
        for number, line in enumerate(stream, 1):
            place = f"{file}, line {number}"
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(_fault(place, "utf-8", line, error)) from None


def half_pair(text: str) -> str | None:
    r"""Returns which half of a surrogate pair stands alone in a text, and where; None if none does.

    Such a half, which JSON can spell as `\ud83d` and a command line gives for bytes that are not UTF-8, is no
    character: no tokenizer, terminal or file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}, character {error.start + 1}"
    return None


def _fault(place: str, encoding: str, content: bytes, error: UnicodeDecodeError) -> str:
    called = encoding.removesuffix("-sig").upper()
    byte = f"byte 0x{content[error.start]:02x} at byte {error.start}"
    if encoding == "utf-16" or encoding == "utf-32":
        return f"{place}: not {called}, as its first bytes say: {error.reason}, {byte}. Save it as UTF-8."
    return (
        f"{place}: not UTF-8: {error.reason}, {byte}. Save it as UTF-8 (iconv -f latin1 -t utf8, "
        "if it is of Western Europe)."
    )

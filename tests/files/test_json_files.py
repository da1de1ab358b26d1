"""JSON files that are damaged are refused with file, line and what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toast.files.json_files import NUMBER, read_json, read_json_lines, read_json_list

KEYS = {"a": int, "b": (str, type(None)), "c": NUMBER}
GOOD = {"a": 1, "b": None, "c": 0.5}


def test_what_fits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD | {"more": [True]}))
    assert read_json(path, KEYS) == GOOD | {"more": [True]}
    path.write_text("\ufeff" + json.dumps(["ä", "b"], ensure_ascii=False), encoding="utf-8")
    assert read_json_list(path, str) == ["ä", "b"]
    path.write_text("".join(json.dumps(GOOD | {"a": i}) + "\n" for i in range(3)))
    assert [row["a"] for row in read_json_lines(path, KEYS)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or not JSON: it is empty"),
        (b'{"a": 1, "b"', r"damaged or not JSON: .* line 1 column"),
        (b'{"a": 1,\n"b": "\xff"}', r"damaged or not JSON: line 2 is not in UTF-8 \(byte 0xff\)"),
        (json.dumps(GOOD).encode("utf-16"), "not in UTF-8"),
        (bytes(100), "damaged or not JSON"),
        (b"[" * 10**5, "damaged or not JSON"),
        (b"[]", "needs a JSON object of settings; it holds a list"),
        (b"null", "it holds None"),
        (b'{"a": 1, "c": 2}', "b is not in it"),
        (b"{}", "a, b, c are not in it"),
        (b'{"a": "1", "b": "", "c": 1}', "a needs a number; it is '1'"),
        (b'{"a": true, "b": "", "c": 1}', "a needs a number; it is True"),
        (b'{"a": 1, "b": {}, "c": 1}', "b needs text or null; it is a dict"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)x\.json.*{message}"):
        read_json(path, KEYS)
    lines = tmp_path / "x.jsonl"
    lines.write_bytes(json.dumps(GOOD).encode() + b"\n" + data.replace(b"\n", b" ") + b"\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2"):
        read_json_lines(lines, KEYS)


def test_lists_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    for text, message in (('["a", 1]', "list of text; it holds 1"), ("{}", "list of text; it holds a dict")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"labels\.json needs a JSON {message}"):
            read_json_list(path, str)


def test_the_last_line_alone_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_json_lines(path, {"a": int}, may_be_cut=True) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"line 3 is damaged or not JSON"):
        read_json_lines(path, {"a": int})
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 is damaged or not JSON"):
        read_json_lines(path, {"a": int}, may_be_cut=True)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is a special file .*; needs a JSON file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match=r"y\.json does not exist"):
        read_json(tmp_path / "y.json")

"""What is missing or malformed is named with file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.language.wording import talk, tokenizer, write_lines
from toast.data.language import open_language
from toast.data.language.row_files import find_files

GOOD = {
    "text": "a",
    "instruction": "a",
    "output": "b",
    "messages": talk("a", "b"),
    "conversations": talk("a", "b"),
}


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("source", "bad", "reason"),
    [
        ("text", {"body": "a", "title": "b"}, "needs a field 'text'; it has 'body', 'title'.*text_field"),
        ("text", {"text": 3}, "field 'text' needs a string; got int: 3"),
        ("text", {"text": None}, "field 'text' needs a string; got NoneType"),
        ("text", ["a"], "needs an object with named fields; got list"),
        ("alpaca", {"instruction": "a"}, "needs a field 'output'; it has 'instruction'"),
        ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "field 'input' needs a string; got int"),
        ("messages", {"text": "a"}, "list of turns in field 'messages'; got a row with 'text'"),
        ("messages", {"messages": "a"}, "list of turns in field 'messages'; got a str"),
        ("messages", messages(), "the conversation is empty"),
        ("messages", messages({"role": "system", "content": "a"}), "the conversation is empty"),
        ("messages", messages(*talk("a", "b")[1:]), "the conversation starts with an answer"),
        ("messages", messages(*talk("a"), "b"), "turn 2: needs an object with role and content; got str"),
        ("messages", messages({"role": "user"}), "turn 1: needs a field 'content'; it has 'role'"),
        ("messages", messages({"role": "user", "content": ["a"]}), "turn 1: field 'content' needs a string"),
        (
            "messages",
            messages({"role": "tool", "content": "a"}),
            "turn 1: the role must be one of.*got 'tool'",
        ),
        ("messages", messages({"role": "user", "content": "a", "tool_calls": [1]}), "turn 1: tool calls"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "human, user, gpt.*got 'bot'"),
    ],
)
def test_a_malformed_row(tmp_path: Path, source: str, bad: Any, reason: str) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [GOOD, bad])
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2.*{reason}"):
        open_language(source, tokenizer(), path=file, block=8)


def test_a_malformed_row_far_down(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [GOOD] * 300 + [{"text": 3}])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 301: field 'text' needs a string; got int: 3"):
        open_language("text", tokenizer(), path=file, block=8)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": \n',
            "a.jsonl, line 3: not JSON: Expecting value at column 1",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8: .* at byte 10"),
        ("a.json", b'[{"text": "a"},\n {"text" "a"}]', "a.json, line 2: not JSON: Expecting ':' delimiter"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "line 2: not JSON: Extra data.*into a .jsonl"),
        ("a.json", b'"a"', "a.json: needs a list of objects, or objects by name; got str"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, row 2: needs an object with named fields; got int"),
        ("a.json", b"[]", "holds no documents"),
        ("a.txt", b"a\nb\xe9", "a.txt, line 2: not UTF-8: .*0xe9"),
        ("a.txt", b"\xff\xfea", "a.txt, line 1: not UTF-16, as its first bytes say"),
        (
            "a.jsonl",
            b'{"text": "\\ud83d"}',
            r"a.jsonl, line 1: field 'text' holds half .* \(.ud83d, character 1",
        ),
        ("a.json", b"[" * 100_000, "a.json: nested too deeply"),
        ("a.parquet", b"PAR", "a.parquet: not a Parquet file"),
        ("a.csv", b"a", "a.csv: this source needs files that end in .jsonl, .ndjson, .json, .parquet, .txt"),
    ],
)
def test_a_malformed_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_language("text", tokenizer(), path=tmp_path / name, block=8)


def test_plain_text_is_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"end in .jsonl, .ndjson, .json, .parquet; got another"):
        open_language("alpaca", tokenizer(), path=tmp_path / "a.txt", block=8)
    with pytest.raises(ValueError, match="there is no such file or folder"):
        open_language("text", tokenizer(), path=tmp_path / "b.txt", block=8)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = ["Peel the carrots.", "Ünder\u2028water"]
    rows = [{"text": text} for text in texts]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "named.json").write_text(json.dumps(dict(zip("ab", rows, strict=True))))
    (tmp_path / "marked.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
    words = tokenizer()
    for name in ("a.jsonl", "a.json", "named.json", "marked.json", "a.parquet", "plain"):
        data = open_language("text", words, path=tmp_path / name, block=64)
        seen = [words.decode(data[i]["input_ids"]) for i in range(len(data))]
        assert seen == [f"{text}<|im_end|>" for text in texts], name


def found(path: Path, split: str | None) -> list[str]:
    """Names of a split's files under a folder."""
    return [str(file.relative_to(path)) for file in find_files(path, split, (".jsonl",)).files]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "validation.jsonl", "notes.md")
    with pytest.raises(
        ValueError, match=r"split 'train' needs.*has 1 files.*none of that split, but validation"
    ):
        found(tmp_path, "train")
    assert found(tmp_path, None) == ["validation.jsonl"]
    write(tmp_path, "b.jsonl", "a.jsonl")
    assert found(tmp_path, "train") == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path, "validation") == found(tmp_path, "val") == ["validation.jsonl"]
    write(tmp_path, "train-00.jsonl", "train/x.jsonl")
    assert found(tmp_path, "train") == ["train-00.jsonl", "train/x.jsonl"]
    with pytest.raises(ValueError, match=r"the split 'test' needs.*called test.jsonl.*has 5 files"):
        found(tmp_path, "test")
    with pytest.raises(ValueError, match="a single file has the split 'train' alone; got 'test'"):
        find_files(tmp_path / "a.jsonl", "test", (".jsonl",))
    with pytest.raises(ValueError, match=r"holds no file that ends in .parquet"):
        find_files(tmp_path, None, (".parquet",))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train.jsonl", "Test.jsonl"),
        ("alpaca_train.jsonl", "alpaca_test.jsonl"),
        ("trainset.JSONL", "testset.jsonl"),
        ("data/Training/a.jsonl", "data/Testing/a.jsonl"),
        ("plain.jsonl", "my-test-2.jsonl"),
        ("a/plain.jsonl", "a/dev/held.jsonl"),
    ],
)
def test_what_is_called_like_another_split_is_never_trained_on(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path, train, test, ".ipynb_checkpoints/train-checkpoint.jsonl", "__MACOSX/._train.jsonl")
    both = find_files(tmp_path, "train", (".jsonl",))
    assert [str(file.relative_to(tmp_path)) for file in both.files] == [train]
    assert both.remarks == (f"{tmp_path}: 1 files are not of the training split: {test}.",)
    assert found(tmp_path, "val" if "dev" in test else "test") == [test]


def test_a_split_that_is_spelled_in_two_ways(tmp_path: Path) -> None:
    write(tmp_path, "dev.jsonl", "val.jsonl")
    assert found(tmp_path, "val") == ["val.jsonl"]
    with pytest.raises(ValueError, match=r"split 'validation' matches several of dev.jsonl, val.jsonl"):
        found(tmp_path, "validation")


def test_a_training_file_that_is_called_like_another_split_is_said(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "gold_test.jsonl", [GOOD])
    assert (
        "says that it is of the split 'test'"
        in open_language("text", tokenizer(), path=file, block=8).remarks[0]
    )
    assert open_language("text", tokenizer(), path=file, split=None, block=8).remarks == ()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_believed(tmp_path: Path, encoding: str) -> None:
    words = tokenizer()
    for name, text in (
        ("a.jsonl", '{"text": "Ünder"}\r\n{"text": "b"}'),
        ("a.txt", "Ünder"),
        ("a.json", '[{"text": "Ünder"}]'),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
        data = open_language("text", words, path=tmp_path / name, block=64)
        assert words.decode(data[0]["input_ids"]) == "Ünder<|im_end|>"

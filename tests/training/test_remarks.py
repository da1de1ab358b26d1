"""What is unusual about data reaches the run, whichever split it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.language.wording import tokenizer, write_lines
from tests.data.vision.pictures import write_folder, write_picture
from toast.training.config_files import load_config, make_config
from toast.training.data import language_splits, vision_sources


def test_the_remarks_of_pictures_are_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "Training", {"a": 4, "b": 4})
    write_folder(tmp_path / "Testing", {"a": 1, "b": 1})
    write_picture(tmp_path / "Training" / "c" / "1.gif")
    data = {"source": "folder", "root": tmp_path, "test": "test", "validation_share": 0.25}
    sources = vision_sources(make_config({"model": {"library": "demo"}, "data": data}))
    assert [len(sources[name]) for name in ("train", "validation", "test")] == [6, 2, 2]
    assert ".gif 1" in sources["train"].remarks[0]
    assert sources["train"].remarks[1:] == ("1 of 3 classes have no picture here, first c.",)
    assert "also in the training split" in sources["test"].remarks[-1]  # drawn alike


@pytest.mark.parametrize("held_out", ["test", "Test.jsonl", "rows/Test.jsonl"])
def test_language_files_of_a_folder(tmp_path: Path, held_out: str) -> None:
    class Fed:
        def __init__(self) -> None:
            self.tokenizer, self.model = tokenizer(), self
            self.config = type("Config", (), {"max_position_embeddings": 64})()

    for name, count in (("rows/Train.jsonl", 3), ("rows/Test.jsonl", 2), ("Test.jsonl", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [{"text": "a b"}] * count)
    data: dict[str, Any] = {"source": "text", "root": tmp_path / "rows", "test": held_out, "block": 8}
    config = make_config({"task": "language", "model": {"name": "x"}, "data": data | {"packing": "none"}})
    splits = language_splits(config, Fed())  # type: ignore[arg-type]
    assert (len(splits.train), len(splits.test)) == (3, 2)
    assert splits.remarks == (
        f"train: {tmp_path / 'rows'}: 1 files are not of the training split: Test.jsonl.",
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_follows_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    text = "name: café\nmodel: {library: demo}\ndata: {source: demo}\n"
    (tmp_path / "a.yaml").write_text(text, encoding=encoding)
    assert load_config(tmp_path / "a.yaml").name == "café"
    (tmp_path / "a.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a.yaml, line 1: not UTF-8: .* byte 0xe9"):
        load_config(tmp_path / "a.yaml")

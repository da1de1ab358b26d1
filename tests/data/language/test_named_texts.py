"""Sources, options, figures and fingerprints."""

from __future__ import annotations

import gc
import pickle
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.language.wording import talk, tokenizer, write_lines
from toast.data.language import LanguageData, check_block, open_language

TEXTS = ["Peel the carrots and boil them in water.", "Chop one onion.", "", "Paris", "x" * 50]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what is written to the caches and temporary folders of the machine within the test's."""
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "texts.jsonl", [{"text": text, "body": "Paris"} for text in TEXTS])


def rows(data: LanguageData) -> list[dict[str, list[int]]]:
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize("bos", [False, True])
def test_documents_alone_are_cut_and_counted(file: Path, bos: bool) -> None:
    words = tokenizer(bos=bos)
    data = open_language("text", words, path=file, block=20)
    whole = [[*words(text)["input_ids"], words.eos_token_id] for text in TEXTS]
    kept = [tokens[:20] for tokens in whole if len(tokens) > 1]
    assert [row["input_ids"] for row in rows(data)] == kept
    assert [row["labels"] for row in rows(data)] == [[-100, *tokens[1:]] for tokens in kept]
    assert data.lengths == [len(tokens) for tokens in kept]
    assert all(row.keys() == {"input_ids", "labels"} for row in rows(data))
    assert data.summary == {
        "documents": len(kept),
        "tokens": sum(map(len, kept)),
        "loss_tokens": sum(len(tokens) - 1 for tokens in kept),
        "longest": max(map(len, whole)),
        "cut": sum(len(tokens) > 20 for tokens in whole),
        "left_out": len(whole) - len(kept),
    }
    assert data.summary["cut"] >= 1


@pytest.mark.parametrize("packing", ["none", "documents", "blocks"])
def test_figures_are_those_of_the_rows(tmp_path: Path, file: Path, packing: str) -> None:
    talks = [{"messages": talk("Why?" * i, "Boil them. " * i, "When?", "Soon")} for i in range(1, 9)]
    told = write_lines(tmp_path / "talks.jsonl", talks)
    for source, path in (("text", file), ("messages", told)):
        if (source, packing) == ("messages", "blocks"):
            continue
        data = open_language(source, tokenizer(), path=path, block=48, packing=packing)
        for part in (data, data.subset([1, 0])):
            seen = rows(part)
            assert part.summary["tokens"] == sum(len(row["input_ids"]) for row in seen) == sum(part.lengths)
            counted = sum(label != -100 for row in seen for label in row["labels"])
            assert part.summary["loss_tokens"] == counted
            assert max(part.lengths) <= 48


def test_a_document_whose_answers_are_cut_off_is_left_out(tmp_path: Path) -> None:
    talks = [{"messages": talk("a", "b")}, {"messages": talk("Why? " * 50, "b")}]
    file = write_lines(tmp_path / "talks.jsonl", talks)
    data = open_language("messages", tokenizer(), path=file, block=40)
    assert len(data) == 1
    assert data.summary["left_out"] == 1
    with pytest.raises(ValueError, match=r"no token counts towards the loss: 2 documents.*rows of 8"):
        open_language("messages", tokenizer(), path=file, block=8)


def test_only_questions(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "talks.jsonl", [{"messages": talk("a")}])
    with pytest.raises(ValueError, match="no token counts towards the loss"):
        open_language("messages", tokenizer(), path=file, block=64)


def test_limit_and_text_field(file: Path) -> None:
    words = tokenizer()
    data = open_language("text", words, path=file, block=64, limit=2, text_field="body")
    assert [words.decode(row["input_ids"]) for row in rows(data)] == ["Paris<|im_end|>"] * 2


def test_rows_can_be_read_from_the_end_and_not_beyond(file: Path) -> None:
    data = open_language("text", tokenizer(), path=file, block=64)
    assert data[-1] == data[len(data) - 1]
    with pytest.raises(IndexError):
        data[len(data)]


def test_fingerprint(tmp_path: Path, file: Path) -> None:
    def of(path: Path = file, words: Any = None, **options: Any) -> str:
        return open_language("text", words or tokenizer(), path=path, **({"block": 64} | options)).fingerprint

    one = of()
    assert len(one) == 64
    assert of() == one
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(file.read_bytes())
    assert of(copied) == one  # what counts is the content
    used = tokenizer()
    used(["a", "b b b"], padding=True, truncation=True, max_length=3)
    assert of(words=used) == one  # and not what the tokenizer did before
    changed = write_lines(tmp_path / "changed.jsonl", [{"text": text} for text in [*TEXTS[:-1], "y" * 50]])
    moved = write_lines(
        tmp_path / "moved.jsonl", [{"text": text} for text in [*TEXTS[:3], "Pari", "s", TEXTS[4]]]
    )
    words = tokenizer()
    words.add_tokens(["zucchini"])
    others = [
        of(changed), of(moved), of(words=words), of(words=tokenizer(bos=True)), of(block=63), of(limit=2),
        of(packing="documents"), of(packing="blocks"), of(text_field="body"),
    ]  # fmt: skip
    data = open_language("text", tokenizer(), path=file, block=64)
    others += [data.subset([0]).fingerprint, data.subset([1]).fingerprint, data.subset([1, 0]).fingerprint]
    others += [data.subset([1, 0]).subset([0]).fingerprint]
    assert len({one, *others}) == len(others) + 1


def test_subset(file: Path) -> None:
    data = open_language("text", tokenizer(), path=file, block=64)
    part = data.subset([2, 0])
    assert rows(part) == [data[2], data[0]]
    assert part.summary["documents"] == 2
    assert rows(part.subset([1])) == [data[0]]


def test_workers_get_the_rows_and_nothing_stays_behind(tmp_path: Path, file: Path) -> None:
    data = open_language("text", tokenizer(), path=file, block=64)
    assert rows(pickle.loads(pickle.dumps(data))) == rows(data)
    assert list((tmp_path / "temporary").iterdir())
    part = data.subset([0])
    del data
    gc.collect()
    assert part[0]["input_ids"]
    assert list((tmp_path / "temporary").iterdir())
    del part
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_the_library(tmp_path: Path, file: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_bytes(file.read_bytes())
    write_lines(folder / "data" / "test.jsonl", [{"text": "Paris"}])
    words = tokenizer()
    options: dict[str, Any] = {"block": 64, "streaming": streaming, "limit": 4}
    data = open_language("hub", words, path=folder, **options)
    assert rows(data) == rows(open_language("text", words, path=file, block=64, limit=4))
    assert len(open_language("hub", words, name=str(folder), split="test", **options)) == 1
    with pytest.raises(ValueError, match=r"set, split 'train', row 1: needs a field 'words'; it has 'text'"):
        open_language("hub", words, path=folder, text_field="words", form="text", **options)
    with pytest.raises(ValueError, match=r"split 'dev': .*set has no such split; its splits are train, test"):
        open_language("hub", words, path=folder, split="dev", **options)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": talk("a", "b"), "text": "a"}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"instruction": "a", "output": "b", "text": "a"}, "alpaca"),
    ],
)
def test_the_form_of_a_data_set_is_found(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    file = write_lines(folder / "train.jsonl", [row])
    words = tokenizer()
    found = open_language("hub", words, path=folder, block=256)
    assert found[0] == open_language(form, words, path=file, block=256)[0]
    assert found[0] == open_language("hub", words, path=folder, block=256, form=form)[0]


def test_a_data_set_of_no_known_form(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(
        ValueError, match=r"row 1: needs one of the fields 'text'.*it has 'question', 'answer'"
    ):
        open_language("hub", tokenizer(), path=tmp_path / "set", block=8)
    with pytest.raises(ValueError, match="data set 'nobody/nothing', split 'train', cannot be loaded"):
        open_language("hub", tokenizer(), name="nobody/nothing", block=8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"source": "pictures"},
            "source must be one of text, alpaca, sharegpt, messages, hub; got 'pictures'",
        ),
        ({"packing": "tight"}, "packing must be one of blocks, documents, none; got 'tight'"),
        ({"block": 1}, "block must be at least 2"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"path": None}, "source 'text' needs path"),
        ({"name": "a/b"}, "name is for source 'hub'; source 'text' reads files, got 'a/b'"),
        ({"streaming": True}, "streaming is for source 'hub'"),
        ({"template": "chat"}, "text takes none, got 'chat'"),
        ({"source": "hub", "name": "a/b"}, "needs either name .a data set on the Hub. or path"),
        ({"source": "hub", "streaming": True}, "streaming needs limit"),
        ({"source": "hub", "form": "prose"}, "form must be one of text, alpaca.*got 'prose'"),
        ({"source": "alpaca", "packing": "blocks"}, "is for text; rows of form 'alpaca' need 'documents' or"),
        (
            {"source": "alpaca", "template": "chap"},
            "'alpaca', 'chat' or the path of a Jinja file; got 'chap'",
        ),
    ],
)
def test_options_that_do_not_fit(file: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_language(tokenizer=tokenizer(), **({"source": "text", "path": file, "block": 8} | options))


def test_a_tokenizer_without_eos(file: Path) -> None:
    with pytest.raises(ValueError, match=r"has no EOS.*set tokenizer.eos_token"):
        open_language("text", tokenizer(eos=None), path=file, block=8)


def test_check_block() -> None:
    from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, MptConfig

    for config, name in (
        (LlamaConfig(max_position_embeddings=64), "max_position_embeddings"),
        (GPT2Config(n_positions=64), "max_position_embeddings"),
        (MptConfig(max_seq_len=64), "max_seq_len"),
        (Gemma3Config(text_config={"max_position_embeddings": 64}), "max_position_embeddings"),
    ):
        check_block(64, config)
        with pytest.raises(ValueError, match=rf"at most the 64 positions of the model \({name}\); got 65"):
            check_block(65, config)
    check_block(10**6, BloomConfig())

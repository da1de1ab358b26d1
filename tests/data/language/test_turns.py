"""Of instructions and conversations the loss counts the answers and the ends of their turns, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.language.wording import (
    CHATML,
    DEAF,
    FORGETFUL,
    MARKED,
    TEMPLATES,
    counted_runs,
    talk,
    tokenizer,
    write_lines,
)
from toast.data.language import LanguageData, open_language

ANSWERS = ["Paris is.", "Chop one onion;\n fry it.", "\n\nÜber é 🍅"]


def opened(tmp_path: Path, turns: Any, words: Any, source: str = "messages", **options: Any) -> LanguageData:
    field = {"messages": "messages", "sharegpt": "conversations"}[source]
    file = write_lines(tmp_path / "talk.jsonl", [{field: each} for each in turns])
    return open_language(source, words, path=file, block=512, **options)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_unmasked_tokens_decode_to_the_answers(
    tmp_path: Path, kind: str, system: str | None, bos: bool
) -> None:
    words = tokenizer(TEMPLATES[kind], bos)
    turns = talk("What is the capital?", ANSWERS[0], "And?", ANSWERS[1], "So?", ANSWERS[2], system=system)
    row = opened(tmp_path, [turns], words)[0]
    said = [each.strip() if kind == "deaf" else each for each in ANSWERS]
    space = " " if kind == "inst" else ""
    assert counted_runs(row, words) == [f"{space}{each}<|im_end|>" for each in said]
    assert words.decode(row["input_ids"]) == words.apply_chat_template(turns, tokenize=False)
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_marks_and_growing_prefixes_agree(tmp_path: Path) -> None:
    turns = [talk("Why?", "Boil them.", "When?", "In butter."), talk("a", "b", system="c")]
    marked, found = (opened(tmp_path, turns, tokenizer(template)) for template in (MARKED, CHATML))
    assert [marked[i] for i in range(2)] == [found[i] for i in range(2)]


def test_a_prompt_is_encoded_as_when_the_model_is_asked(tmp_path: Path) -> None:
    """The line break that ends the header and the answer's own would be one token."""
    words = tokenizer()
    assert len(words("\n\n")["input_ids"]) == 2
    words.add_tokens(["\n\n"])
    turns = talk("a", "\nb")
    row = opened(tmp_path, [turns], words)[0]
    asked = words.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(asked)] == asked
    assert counted_runs(row, words) == ["\nb<|im_end|>"]


def test_two_answers_in_a_row_and_a_last_question(tmp_path: Path) -> None:
    words = tokenizer()
    turns = [*talk("a", "b"), {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    row = opened(tmp_path, [turns], words)[0]
    assert counted_runs(row, words) == ["b<|im_end|>", "c<|im_end|>"]
    assert words.decode(row["input_ids"]).endswith("user\nd<|im_end|>\n")


def test_sharegpt_in_both_spellings_is_messages(tmp_path: Path) -> None:
    words = tokenizer()
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = talk("a", "b", "c", "d", system="e")
    spelled = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    expected = opened(tmp_path, [turns], words)[0]
    assert opened(tmp_path, [spelled], words, "sharegpt")[0] == expected
    assert opened(tmp_path, [turns], words, "sharegpt")[0] == expected
    beside = write_lines(tmp_path / "beside.jsonl", [{"system": "e", "conversations": spelled[1:]}])
    assert open_language("sharegpt", words, path=beside, block=512)[0] == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FORGETFUL, "line 2: .*turns 1 to 2 in another way when more follow"),
        (
            CHATML.replace("m.content", "m.content | upper"),
            "changes the answer of turn 2: 'b' is written as 'B",
        ),
        ("{{ raise_exception('no system') }}", "line 1: no system"),
        (DEAF.replace("m.role", "loop.revindex|string"), "another way when"),
    ],
)
def test_a_template_that_hides_where_answers_are(tmp_path: Path, template: str, reason: str) -> None:
    turns = [talk("a", "b"), talk("a", "b", "c", "d")]
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        opened(tmp_path, turns, tokenizer(template))


def test_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(MARKED)
    turns = [talk("a", "b")]
    own = opened(tmp_path, turns, tokenizer(None), template=str(tmp_path / "own.jinja"))
    assert own[0] == opened(tmp_path, turns, tokenizer(MARKED))[0]
    with pytest.raises(ValueError, match=r"need a chat template.*\.jinja"):
        opened(tmp_path, turns, tokenizer(None))
    with pytest.raises(ValueError, match="template must be 'chat' or the path of a Jinja file; got 'alpaca'"):
        opened(tmp_path, turns, tokenizer(), template="alpaca")


RECIPE = {"instruction": "Boil.", "input": "The carrots", "output": "Peel them."}
PLAIN = {"instruction": "Write a response.", "output": ": so"}  # a colon would merge with the prompt's


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_alpaca_with_the_official_prompt(tmp_path: Path, bos: bool, metaspace: bool) -> None:
    words = tokenizer(None, bos, metaspace)
    words.add_tokens(["::", ":Peel"])
    file = write_lines(tmp_path / "alpaca.jsonl", [RECIPE, PLAIN])
    data = open_language("alpaca", words, path=file, block=1024)
    prompts = [
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nBoil.\n\n"
        "### Input:\nThe carrots\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWrite a response.\n\n### Response:",
    ]
    for row, prompt, answer in zip((data[0], data[1]), prompts, ("Peel them.", ": so"), strict=True):
        asked = words(prompt)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert row["input_ids"].count(words.bos_token_id) == bos
        assert row["labels"][: len(asked)] == [-100] * len(asked)
        assert row["labels"][len(asked) :] == row["input_ids"][len(asked) :]
        assert [run.lstrip() for run in counted_runs(row, words)] == [f"{answer}<|im_end|>"]


def test_alpaca_as_a_conversation(tmp_path: Path) -> None:
    words = tokenizer()
    file = write_lines(tmp_path / "alpaca.jsonl", [RECIPE, PLAIN])
    data = open_language("alpaca", words, path=file, block=512, template="chat")
    turns = [talk("Boil.\n\nThe carrots", "Peel them."), talk("Write a response.", ": so")]
    told = opened(tmp_path, turns, words)
    assert [data[i] for i in range(2)] == [told[i] for i in range(2)]

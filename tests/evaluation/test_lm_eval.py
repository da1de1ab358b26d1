"""lm-eval's tasks on a wrapped model, against log-likelihoods computed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toast
from tests.models import VOCABULARY, awaken, decoder
from toast.evaluation.lm_eval import evaluate_with_lm_eval

QUESTIONS = [
    {"question": "w2 w3 w4", "choices": ["w5", "w6 w7", "w8"], "answer": 0},
    {"question": "w9", "choices": ["w10", "w11", "w12 w13 w14"], "answer": 2},
    {"question": "w20 w21", "choices": ["w22", "w23", "w24"], "answer": 1},
    {"question": "w30 w31 w32 w33", "choices": ["w2", "w3", "w4"], "answer": 1},
]


def tokenizer() -> Any:
    """A word a token: `w5` is token 5; 0 and 1 are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task of several choices."""
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(lines)
    task = {
        "task": "words", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path / "cache"),
        },
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # YAML holds JSON
    return tmp_path


def likelihood(model: Any, question: str, choice: str) -> float:
    """The sum of the log-probabilities of a choice's tokens."""
    context, answer = ([int(word[1:]) for word in text.split()] for text in (question, choice))
    logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    start = len(context) - 1
    return float(sum(logits[start + place, token] for place, token in enumerate(answer)))


@torch.no_grad()
def likelihoods(model: Any) -> dict[tuple[str, str], float]:
    """Those of every question and choice."""
    return {
        (row["question"], choice): likelihood(model, row["question"], choice)
        for row in QUESTIONS
        for choice in row["choices"]
    }


# lm-eval and what it imports warn of themselves.
@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_are_those_computed_by_hand(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'toast-steering[lm-eval]'")
    from lm_eval.models.huggingface import HFLM

    model = awaken(toast.wrap(decoder("llama-grouped", dtype=torch.float32))).eval()
    seen: dict[tuple[str, str], float] = {}
    inner = HFLM.loglikelihood

    def loglikelihood(self: Any, requests: list[Any], **options: Any) -> Any:
        found = inner(self, requests, **options)
        for request, (value, _) in zip(requests, found, strict=True):
            seen[request.args[0], request.args[1].strip()] = value
        return found

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    found = evaluate_with_lm_eval(model, tokenizer(), ["words"], include_path=tasks, batch_size=2)
    expected = likelihoods(model)
    assert seen == pytest.approx(expected, abs=1e-4)
    with model.disable_adapter():  # else the adapter would not be part of what was measured
        assert seen != pytest.approx(likelihoods(model), abs=1e-4)
    hits = 0
    for row in QUESTIONS:
        scores = [expected[row["question"], choice] for choice in row["choices"]]
        hits += scores.index(max(scores)) == row["answer"]
    assert found["words"]["acc"] == hits / len(QUESTIONS)
    assert found["words"].keys() >= {"acc", "acc_stderr"}
    limited = evaluate_with_lm_eval(model.train(), tokenizer(), ["words"], tasks, limit=2)
    assert limited["words"]["acc"] in (0, 0.5, 1)
    assert model.training


@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_are_refused(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    manager = lm_eval_tasks.TaskManager

    def own_tasks_only(include_path: str, include_defaults: bool = True) -> Any:
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", own_tasks_only)
    with pytest.raises(ValueError, match=r"tasks: needs names of lm-eval's 1 tasks.*; got sentences"):
        evaluate_with_lm_eval(decoder(), tokenizer(), ["words", "sentences"], include_path=tasks)


def test_lacking_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'toast-steering\[lm-eval\]'"):
        evaluate_with_lm_eval(None, None, ["words"])

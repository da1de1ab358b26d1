"""TRL's trainers take a `ToastConfig` as `peft_config`, train the adapter alone, and save it with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import VOCABULARY, decoder
from toast import ToastConfig

trl = pytest.importorskip("trl", reason="needs TRL: pip install 'toast-steering[trl]'")

SETTINGS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": [],
    "learning_rate": 1e-2, "save_strategy": "no",
}  # fmt: skip
ROWS = {
    "SFT": {"text": ["w3 w4 w5 w6"] * 4},
    "DPO": {"prompt": ["w3 w4"] * 4, "chosen": ["w5 w6"] * 4, "rejected": ["w7 w8"] * 4},
    "GRPO": {"prompt": ["w3 w4"] * 4},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"max_length": 16},
    "DPO": {"max_length": 16},
    "GRPO": {"num_generations": 4, "max_completion_length": 4, "temperature": 9.0},
}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="w2"
    )


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(i) for i in range(len(completions))]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ROWS)
def test_trainers_train_the_adapter_alone_and_save_it(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = getattr(trl, f"{method}Config")(str(tmp_path / "run"), **(SETTINGS | OPTIONS[method]))
    reward = {"reward_funcs": _reward} if method == "GRPO" else {}
    trainer = getattr(trl, f"{method}Trainer")(
        model=base, args=settings, train_dataset=Dataset.from_dict(ROWS[method]),
        processing_class=_tokenizer(), peft_config=ToastConfig(), **reward,
    )  # fmt: skip
    before = {name: held.detach().clone() for name, held in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, held in trainer.model.named_parameters() if not torch.equal(held, before[n])}
    assert moved and all(".toast_" in name for name in moved)
    trainer.create_model_card()
    trainer.save_model()
    assert {"toast", "trl", method.lower()} <= {*ModelCard.load(tmp_path / "run" / "README.md").data.tags}
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
    given = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(given).logits, trainer.model.eval()(given).logits)

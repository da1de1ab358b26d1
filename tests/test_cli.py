"""The command `toast`: quick help, a real continuation, and messages in the place of tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toast
from tests.models import VOCABULARY, awaken, decoder
from toast.cli import app, main


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "toast", *args], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny language model with a tokenizer of its own, as `save_pretrained` writes them."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(place)
    decoder("llama", torch.float32).save_pretrained(place)
    return place


def test_help_names_the_commands_and_loads_no_torch() -> None:
    code = (
        "import sys, toast.cli; sys.argv = ['toast', '--help']\n"
        "try: toast.cli.main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "demo" in done.stdout and "generate" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_version() -> None:
    assert command("--version").stdout.strip() == f"toast {toast.__version__}"


def test_a_missing_folder_is_said_without_a_traceback() -> None:
    done = command("generate", "no-such-folder", "w2")
    assert done.returncode == 2
    assert "'no-such-folder' does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_continues_a_prompt_with_an_adapter(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    from transformers import LlamaForCausalLM

    model = awaken(toast.wrap(LlamaForCausalLM.from_pretrained(folder)))
    toast.save_adapter(model, tmp_path / "adapter")
    expected = model.eval().generate(torch.tensor([[2, 3, 4]]), max_new_tokens=5, do_sample=False)[0].tolist()

    def run(*args: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["toast", "generate", str(folder), "w2 w3 w4", "--tokens", "5", *args]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out.strip()

    steered = run("--adapter", str(tmp_path / "adapter"))
    assert steered.split() == [f"w{i}" for i in expected]
    assert run("--seed", "1") == run("--seed", "1")


def test_the_app_has_the_documented_commands() -> None:
    assert {c.name or c.callback.__name__ for c in app.registered_commands} == {
        "benchmark", "compare", "configs", "demo", "evaluate", "export", "families", "features", "generate",
        "import_official", "plan", "pretune", "report", "sweep", "tune", "visualize",
    }  # fmt: skip

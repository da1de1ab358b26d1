"""Continuing a prompt with a local, steered language model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import toast


def continue_prompt(
    folder: Path, prompt: str, adapter: Path | None = None, tokens: int = 40, seed: int | None = None
) -> str:
    """Continues a prompt.

    Args:
        folder: A causal language model and its tokenizer, as `save_pretrained` writes them.
        prompt: Text to continue.
        adapter: A saved TOAST adapter; None wraps the model anew, which changes nothing yet.
        tokens: Tokens to add.
        seed: Samples with this seed; None takes the likeliest token each time.

    Returns:
        The prompt and its continuation.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = toast.wrap(base) if adapter is None else PeftModel.from_pretrained(base, str(adapter))
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    if seed is not None:
        set_seed(seed)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=seed is not None)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))

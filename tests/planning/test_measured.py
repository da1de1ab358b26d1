"""What is planned is what PyTorch's allocator gives out when the same model is built and trained.

Measured by the profiler, which notes every allocation; it has no part in planning.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

import toast
from toast.planning.estimating import Plan, plan
from toast.training.config_files import make_config
from toast.training.preparing import checkpoint_activations

SAMPLES = 8
VIT = {"img_size": 64, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
LLAMA = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
TOKENS = 64


def _peak(run: Callable[[], Any]) -> int:
    """Returns the most bytes that are allocated at a time while something runs."""
    gc.collect()  # else what earlier tests have left is given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    del held
    return most


def _train(model: nn.Module, loss: Callable[[], Tensor], steps: int = 2) -> tuple[Any, ...]:
    """Trains as the program's loop does, and returns what has to live as long as the run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)  # as on an accelerator
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _vit(**options: Any) -> Any:
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, **VIT)
    return toast.wrap(model.train(), modules_to_save=["head"], **options)


def _train_vit(model: Any) -> Any:
    images, labels = torch.randn(SAMPLES, 3, 64, 64), torch.zeros(SAMPLES, dtype=torch.long)
    return _train(model, lambda: F.cross_entropy(model(images), labels, reduction="sum") / SAMPLES)


def _train_stored(model: Any) -> Any:
    images, labels = torch.randn(SAMPLES, 3, 64, 64), torch.zeros(SAMPLES, dtype=torch.long)
    stored = toast.first_pass(model, images)

    def loss() -> Tensor:
        with toast.given_first_pass(model, stored):
            return F.cross_entropy(model(images), labels)

    return _train(model, loss)


def _llama(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=dtype).train()


def _train_llama(model: Any, autocast: bool = False) -> Any:
    tokens = torch.randint(0, 300, (SAMPLES, TOKENS))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    return _train(model, loss)


def _planned_vit(**settings: Any) -> Plan:
    options = {"patch_size": 8} | VIT
    model = {"library": "timm", "name": "vit_tiny_patch16_224", "pretrained": False, "options": options}
    base = {"model": model, "data": {"source": "folder", "root": "nowhere"}, "batch_size": SAMPLES}
    return plan(make_config(base, [(k.replace("__", "."), v) for k, v in settings.items()]))


def _planned_llama(tmp_path: Path, **settings: Any) -> Plan:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    base = {
        "task": "language",
        "model": {"library": "transformers", "name": str(tmp_path)},
        "data": {"source": "text", "block": TOKENS},
        "batch_size": SAMPLES,
    }
    return plan(make_config(base, [(k.replace("__", "."), v) for k, v in settings.items()]))


def _compare(planned: Plan, measured: int) -> None:
    peak = planned.ways[0].peak
    assert peak == pytest.approx(measured, rel=0.05)


def test_a_vit() -> None:
    measured = _peak(lambda: _train_vit(_vit()))
    planned = _planned_vit()
    assert planned.steps[0].form == "composed"
    _compare(planned, measured)


def test_toast_lite() -> None:
    measured = _peak(lambda: _train_vit(_vit(lora_rank=4)))
    _compare(_planned_vit(method="toast-lite"), measured)


def test_a_top_half() -> None:
    measured = _peak(lambda: _train_vit(_vit(steer_from=2)))
    _compare(_planned_vit(method__options={"steer_from": 2}), measured)


def test_a_stored_first_pass() -> None:
    measured = _peak(lambda: _train_stored(_vit()))
    _compare(_planned_vit(first_pass__mode="cached"), measured)


def test_a_checkpointed_vit() -> None:
    def run() -> Any:
        model = _vit()
        model.get_base_model().set_grad_checkpointing(True)
        return _train_vit(model)

    _compare(_planned_vit(checkpointing=True), _peak(run))


def test_a_llama_token_by_token(tmp_path: Path) -> None:
    measured = _peak(lambda: _train_llama(toast.wrap(_llama(), feedback_form="per_token")))
    _compare(_planned_llama(tmp_path, method__options={"feedback_form": "per_token"}), measured)


def test_a_llama_in_bfloat16(tmp_path: Path) -> None:
    def run() -> Any:
        model = toast.wrap(_llama(torch.bfloat16))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return _train_llama(model, autocast=True)

    _compare(_planned_llama(tmp_path, model__dtype="bfloat16"), _peak(run))


def test_a_checkpointed_llama(tmp_path: Path) -> None:
    def run() -> Any:
        model = _llama()
        checkpoint_activations(model)
        return _train_llama(toast.wrap(model))

    _compare(_planned_llama(tmp_path, checkpointing=True), _peak(run))


def test_lora(tmp_path: Path) -> None:
    options = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    measured = _peak(lambda: _train_llama(get_peft_model(_llama(), LoraConfig(**options))))
    _compare(_planned_llama(tmp_path, method="lora"), measured)

"""Bases that are quantised to 4 bits or placed by `device_map`, data parallel training, and peak memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import toast
from tests.accelerator.placed import relative_error, to_device, twins
from tests.models import decoder, tokens
from tests.steered import call, gradients, inputs, steer, trained
from toast.benchmark import costs
from toast.benchmark.contenders import FULL, SMALL, Place


def copy_adapter(model: Any, exact: Any) -> Any:
    """Gives a model the adapter of another one."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            assert not parameter.is_meta
            parameter.copy_(trained(exact)[name])
    return model


def test_a_base_of_four_bits(device: torch.device, tmp_path: Path) -> None:
    """Against the same weights unpacked, in double precision."""
    pytest.importorskip("bitsandbytes")
    decoder(hidden_size=192, intermediate_size=64, dtype=torch.float32).save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    how = {"quantization_config": packing, "device_map": {"": device.type}, "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    assert base.model.layers[0].self_attn.v_proj.weight.dtype == torch.uint8
    exact = steer(AutoModelForCausalLM.from_pretrained(tmp_path, **how).dequantize().cpu().double(), "llama")
    model, text = copy_adapter(toast.wrap(base), exact), tokens(2)
    here = text.to(device)
    assert relative_error(gradients(model.train(), here), gradients(exact, text)) < 3e-5
    model.eval()
    with torch.no_grad():
        with model.disable_adapter(), exact.disable_adapter():
            plain = relative_error(call(model, here), call(exact, text))
        assert plain < 0.03  # kernels for CPUs infer in bfloat16
        assert relative_error(call(model, here), call(exact, text)) < max(1e-5, 4 * plain)
    assert model.generate(here, max_new_tokens=3).shape == (2, text.shape[1] + 3)


@pytest.mark.parametrize("share", [None, 0.8], ids=["all", "in-part"])
def test_a_device_map(device: torch.device, share: float | None, tmp_path: Path) -> None:
    """All on the device; or a part, and the rest in memory (beside a CPU: in files), fetched when it runs."""
    bare = decoder(dtype=torch.float32)
    bare.save_pretrained(tmp_path / "model")
    room: dict[int | str, Any] | None = None
    if share is not None:
        room = {"cpu": "1GB"} | {
            "cpu" if device.type == "cpu" else 0: int(share * bare.get_memory_footprint())
        }
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=room, offload_folder=tmp_path / "rest"
    )
    places = set(getattr(base, "hf_device_map", {}).values())
    assert (len(places) > 1) == (share is not None)
    exact = steer(bare.double(), "llama")
    model, text = copy_adapter(toast.wrap(base), exact).eval(), tokens(2)
    assert relative_error(call(model, text.to(device)), call(exact, text)) < 1e-5
    assert relative_error(gradients(model, text.to(device)), gradients(exact, text)) < 3e-5
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(text.to(device), **how).cpu(), exact.generate(text, **how))


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, joined as its device is: by NCCL, or gloo on CPUs."""
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_data_parallel(device: torch.device, kind: str) -> None:
    """Two micro-batches, whose gradients are reduced once."""
    model, _ = twins(kind, device, torch.float32)
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parts = [to_device(x, device, torch.float32) for x in inputs(kind, 2)]
    for number, x in enumerate(parts):
        with parallel.no_sync() if number == 0 else nullcontext():
            call(parallel, x).square().mean().backward()
        call(alone, x).square().mean().backward()
    found, expected = ([p.grad for p in trained(each).values()] for each in (model, alone))
    assert relative_error(found, expected) < 1e-6


def test_peak_memory_of_a_step(device: torch.device) -> None:
    """TOAST keeps what LoRA does, and of its first pass nothing. On a CPU the models are tiny."""
    size, half = (SMALL, 1.05) if device.type == "cpu" else (FULL, 0.85)
    found = costs.memory(replace(size, place=Place(device)), ["TOAST", "TOAST, top half"], 16)
    assert found["TOAST"].median < 1.25  # `toast plan` says 1.14
    assert found["TOAST, top half"].median < half  # and 0.71

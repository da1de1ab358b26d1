"""The benchmark runs, on tiny models; no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toast
from tests.models import decoder, images, tokens, vit
from tests.steered import assert_same, call
from toast.baselines.vpt import find_prompts
from toast.benchmark import costs
from toast.benchmark.contenders import PROMPTS, SMALL, languages, visions
from toast.benchmark.costs import continued, stepper
from toast.benchmark.suite import MEASURES, place_of, run
from toast.benchmark.textbook import TextbookLlama, TextbookVit
from toast.benchmark.timing import counted_flops
from toast.steering import find_steering


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("memory", "step-32", "waits")])
def test_measures_run_and_are_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, [name], rounds=1, threads=None, small=True)[name]
    assert found
    assert all(ratio.low <= ratio.median <= ratio.high for ratio in found.values())
    written = json.loads((tmp_path / "benchmark.json").read_text())["ratios"][name]
    assert written.keys() == found.keys()
    assert MEASURES[name].title in capsys.readouterr().out
    assert (tmp_path / "depth.png").is_file() == (name == "depth")


def test_unknown_measures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only: needs some of forward, .*; got speed"):
        run(tmp_path, ["speed"], rounds=1, threads=None, small=True)


def test_peak_memory_is_that_of_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = costs._peak_of_process(SMALL, "TOAST", 2)
    assert 1e5 < peak < 1e7  # KiB, of a process with PyTorch
    peaks = {("LoRA", 2): 4 * peak, ("TOAST", 2): peak}
    monkeypatch.setattr(costs, "_peak_of_process", lambda size, *given: peaks[given])
    assert costs.memory(SMALL, ["TOAST"], 2)["TOAST"].median == 1 / 4


def test_places_are_found_or_refused() -> None:
    place = place_of("cpu", "bfloat16", compiled=False)
    assert (place.device.type, place.dtype) == ("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="dtype: needs one of float32, bfloat16, float16; got 'int8'"):
        place_of("cpu", "int8", compiled=False)
    with pytest.raises(ValueError, match="device: needs cpu, or the accelerator that PyTorch finds here"):
        place_of("tpu", "float32", compiled=False)


def test_measures_run_under_autocast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, ["forward", "waits"], 1, None, small=True, dtype="bfloat16")
    assert found["forward"]["TOAST"].floor is not None
    assert found["waits"] == {}
    assert "not on this device" in capsys.readouterr().out
    machine = json.loads((tmp_path / "benchmark.json").read_text())["machine"]
    assert machine["dtype"] == "torch.bfloat16"


def test_a_compiled_contender_runs_and_its_flops_are_counted() -> None:
    size = replace(SMALL, place=place_of("cpu", "float32", compiled=True))
    run_compiled, run_eager = (stepper(each, "TOAST", each.images(2)) for each in (size, SMALL))
    run_compiled()
    assert counted_flops(run_compiled) == counted_flops(run_eager) > 0


def same_parameters(textbook: object, model: object) -> None:
    steering, feedback = find_steering(model), textbook.feedback
    with torch.no_grad():
        steering.selector.toast_task_embedding["default"].copy_(feedback.task_embedding.abs())
        feedback.task_embedding.abs_()
        feedback.channel_transform.normal_(std=0.3)
        steering.selector.toast_channel_transform["default"].copy_(feedback.channel_transform)
        for index, value in enumerate(steering.values):
            value.toast_to_state["default"].weight.copy_(feedback.to_state[index].weight)
            value.toast_to_signal["default"].weight.copy_(feedback.to_signal[index].weight)


def test_the_textbook_computes_the_same() -> None:
    torch.manual_seed(0)
    textbook = TextbookVit(vit()).double()
    torch.manual_seed(0)
    model, x = toast.wrap(vit()), images(2)
    model.get_base_model().load_state_dict(textbook.vit.state_dict(), strict=False)
    textbook.vit.load_state_dict(plain_state(model))
    same_parameters(textbook, model)
    assert_same(textbook(x), model(x))
    base = decoder("llama")
    model = toast.wrap(base)
    book = TextbookLlama(decoder("llama")).double()
    book.llama.load_state_dict(plain_state(model))
    same_parameters(book, model)
    text = tokens(1, 6)
    torch.testing.assert_close(book(text), call(model, text), rtol=0, atol=1e-5)
    assert torch.equal(continued(book, text, 4), continued(model.eval(), text, 4))


def plain_state(model: object) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".toast_" not in name
    }


def test_prompts_get_gradients_and_weights_stay() -> None:
    model = visions(SMALL)["VPT-deep"]()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    tokens_of_prompts = find_prompts(model).tokens
    assert tokens_of_prompts.shape[:2] == (len(model.blocks), PROMPTS)
    assert tokens_of_prompts.grad.abs().sum((1, 2)).gt(0).all()
    assert model.blocks[0].attn.qkv.weight.grad is None
    assert model.head.weight.grad is not None


def test_a_step_changes_what_is_trained() -> None:
    step = stepper(SMALL, "TOAST, top half, stored", torch.randn(2, 3, 32, 32))
    step()
    assert set(languages(SMALL)) > {"plain", "LoRA", "textbook", "TOAST"}
